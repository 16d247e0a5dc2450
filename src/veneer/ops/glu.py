"""Gated linear units (Shazeer 2020, arXiv 2002.05202): ``act(gate) * up``, the activation recomputed backward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SWIGLU_OAI = "swiglu_oai"
UNITS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, SWIGLU_OAI: 9}
"""Gated units of experts, with their numbers in csrc/core/activations.h."""


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


def unit_forward(inner: Float[Tensor, "n two_d"], unit: str, *, backend: str | None = None) -> Float[Tensor, "n d"]:
    """Return the gated unit, one of `UNITS`, of a layer's output that holds gate and up.

    For one of `ACTIVATIONS`, gate comes before up. For ``swiglu_oai`` they alternate, and the unit is ``(up + 1) · gate
    · sigmoid(1.702 · gate)`` with gate at most 7 and up within ± 7 (gpt-oss, arXiv 2508.10925, section 2.1). Computed
    in float32, rounded once. Raises ConfigError for an unknown unit.
    """
    if unit != SWIGLU_OAI:
        return glu_forward(*_halves(inner), unit, backend=backend)
    out: Tensor = implementation("glu.clamped_forward", inner.device, backend)(inner)
    return out


def unit_backward(
    dh: Float[Tensor, "n d"], inner: Float[Tensor, "n two_d"], unit: str, *, backend: str | None = None
) -> None:
    """Write the gradient with respect to ``inner`` into it, and the output of `unit_forward` into dh, which has its
    dtype.
    """
    if unit != SWIGLU_OAI:
        glu_backward(dh, *_halves(inner), unit, owns_dh=True, owns_inputs=True, backend=backend)
    else:
        implementation("glu.clamped_backward", inner.device, backend)(dh, inner)


def _halves(inner: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = inner.chunk(2, dim=1)
    return gate, up


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; there are {list(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ShapeError(
            f"a gated unit takes tensors of one shape and dtype; given {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
