"""Gradients of LoRA's factors in the metric of their product, before any optimizer's step (Zhang and Pilanci 2024,
arXiv:2402.02347, eq. 5 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Factors A (r, i) and B (o, r) of one layer. B's gradient is divided by ``scale²``.

    A factor without a gradient stays as it is.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


def precondition(optimizer: Optimizer, layers: Sequence[Factors], damping: float) -> RemovableHandle:
    """Make the steps of an optimizer use ``(Bᵀ B + δ)⁻¹ g`` for A, and ``g (A Aᵀ + δ)⁻¹ / scale²`` for B.

    ``damping`` is δ. Return the handle that restores the optimizer's own steps. A step with a closure, which computes
    gradients of its own, raises ConfigError.
    """

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # args: itself first
        if any(given is not None for given in (*args[1:], *kwargs.values())):
            raise ConfigError(
                "step() has a closure, and its gradients would not be preconditioned: call it without one"
            )
        for each in layers:
            _change(each, damping)

    return optimizer.register_step_pre_hook(before)


@torch.no_grad()
def _change(factors: Factors, damping: float) -> None:
    wide = torch.promote_types(factors.a.dtype, torch.float32)
    a, b = factors.a.to(wide), factors.b.to(wide)
    if factors.a.grad is not None:
        factors.a.grad.copy_(_inverse(b.T @ b, damping) @ factors.a.grad.to(wide))
    if factors.b.grad is not None:
        factors.b.grad.copy_(factors.b.grad.to(wide) @ _inverse(a @ a.T, damping) / factors.scale**2)


def _inverse(gram: Float[Tensor, "r r"], damping: float) -> Float[Tensor, "r r"]:
    """Return the pseudo-inverse of ``gram + damping * I``. An inverse may not exist, because a factor may be
    rank-deficient and the damping tiny.
    """
    found: Tensor = torch.linalg.pinv(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return found
