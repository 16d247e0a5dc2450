"""Gated linear units (Shazeer 2020, arXiv 2002.05202): ``act(gate) * up``, the activation recomputed backward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu_forward(
    gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"], activation: str, *, backend: str | None = None
) -> Float[Tensor, "*batch d"]:
    """Return ``act(gate) * up`` with act one of `ACTIVATIONS`; computed in float32, rounded once.

    gate and up may be the two halves of one product: only the last axis must be contiguous. Raises ShapeError if the
    two differ in shape or dtype, ConfigError for an unknown activation.
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


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; there are {list(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ShapeError(
            f"a gated unit takes tensors of one shape and dtype; given {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
