"""Activations of feed-forward layers without a gate, and their derivatives, in float32, rounded once."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.dispatch import implementation

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


def activation_forward(x: Float[Tensor, "*batch d"], kind: str, *, backend: str | None = None) -> Tensor:
    """Return ``act(x)`` with act one of `KINDS`. Raises ConfigError on an unknown one."""
    _check(kind)
    y: Tensor = implementation("activation.activation_forward", x.device, backend)(x, kind)
    return y


def activation_backward(
    dy: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], kind: str, *, backend: str | None = None
) -> Tensor:
    """Return the gradient with respect to x, given the gradient dy of the output. Raises ConfigError on an unknown
    activation.
    """
    _check(kind)
    dx: Tensor = implementation("activation.activation_backward", x.device, backend)(dy, x, kind)
    return dx


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"activation {kind!r} is unknown; there are {list(KINDS)}")
