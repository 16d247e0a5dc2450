"""Positions as an attention bias that decreases with distance (Press, Smith and Lewis 2022, arXiv:2108.12409)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Alibi:
    """Bias ``slope · (key position - query position)`` of each head's scores, added after scaling."""

    n_heads: int

    def slopes(self) -> Float[Tensor, " n_heads"]:
        """Return one slope a head, float32: 2^(-8 i / n) for n a power of two, and between them for further heads."""
        n = 2 ** math.floor(math.log2(self.n_heads))
        first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
        between = [2.0 ** (-4 * i / n) for i in range(1, 2 * (self.n_heads - n), 2)]
        return torch.tensor(first + between)
