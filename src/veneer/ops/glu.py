"""Gated linear units (Shazeer 2020, arXiv 2002.05202): ``act(gate) * up``, the activation recomputed backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu(
    gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"], activation: str, *, backend: str | None = None
) -> Float[Tensor, "*batch d"]:
    """Return ``act(gate) * up`` with act one of `ACTIVATIONS`; computed in float32, rounded once.

    Only gate and up are kept for the backward pass. Raises ShapeError if the two differ in shape or dtype, ConfigError
    on an unknown activation.
    """
    out: Tensor = _Glu.apply(gate, up, activation, backend)  # type: ignore[no-untyped-call]
    return out


def glu_forward(
    gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"], activation: str, *, backend: str | None = None
) -> Float[Tensor, "*batch d"]:
    """Return the output of `glu`.

    gate and up may be the two halves of one product: only the last axis must be contiguous.
    """
    _check(gate, up, activation)
    out: Tensor = implementation("glu.glu_forward", gate.device, backend)(gate, up, activation)
    return out


def glu_backward(
    dh: Float[Tensor, "*batch d"],
    gate: Float[Tensor, "*batch d"],
    up: Float[Tensor, "*batch d"],
    activation: str,
    *,
    owns_dh: bool = False,
    owns_inputs: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
    """Return (d gate, d up, h): the gradients and, from the same pass, the output, which the next layer's backward
    reads.

    ``owns_inputs`` writes the gradients into gate and up, ``owns_dh`` the output into dh; these tensors are returned.
    """
    _check(gate, up, activation)
    _check(dh, gate, activation)
    kernel = implementation("glu.glu_backward", gate.device, backend)
    dgate, dup, h = kernel(dh, gate, up, activation, (owns_inputs, owns_dh))
    return dgate, dup, h


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return glu_forward(gate, up, activation, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = glu_backward(dh, gate, up, ctx.activation, backend=ctx.backend)
        return dgate, dup, None, None


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; there are {list(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ShapeError(
            f"a gated unit takes tensors of one shape and dtype; given {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
