"""LoftQ: the factors start as the quantization error of the weight.

``scale · B A`` is the best approximation of rank r of ``W - Q``. Source: Li et al. 2023, arXiv:2310.08659, algorithm 1
with T = 1.

Differences: more iterations would quantize another matrix than W; here the codes are those of the base, which
other adapters share. The scale alpha / r is taken into account; the paper has none, and PEFT ignores its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError
from veneer.inits import Factors
from veneer.inits.pissa import best_factors


def lost(weight: Float[Tensor, "o i"], quantized: Float[Tensor, "o i"], r: int, scale: float) -> Factors:
    """Return A (r, i) and B (o, r) in float32 on the CPU with ``scale · B A`` nearest to ``weight - quantized``.

    Raises ConfigError if the weight has fewer than r directions.
    """
    if r > min(weight.shape):
        raise ConfigError(
            f"LoftQ: r={r} is more than the rank of a weight of shape {tuple(weight.shape)}: give at most "
            f"{min(weight.shape)}"
        )
    residual = weight.to(quantized.device, torch.float32) - quantized.to(torch.float32)
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    return best_factors(u[:, :r], s[:r], vt[:r], scale)
