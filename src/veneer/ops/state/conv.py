"""Short causal convolution, a kernel of its own for each channel, with a gate in front of it and one behind it or none.

LFM2 mixes its tokens by it; Mamba 2 and the gated delta rule have one in front of their scan. A token sees the last
tokens of its own sequence alone: a packed row gives what its sequences give one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.forks import Fork

ACTIVATIONS = ("identity", "silu")
LONGEST = 16  # tokens that the kernels take


@dataclass(frozen=True, slots=True)
class GatedInput:
    """Input x (n, d) of a convolution, the gate ``before`` it and the one ``after`` it, of the same shape or None."""

    x: Float[Tensor, "n d"]
    before: Float[Tensor, "n d"] | None = None
    after: Float[Tensor, "n d"] | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gate before, x, and the gate after."""
        return self.before, self.x, self.after


@dataclass(frozen=True, slots=True)
class ConvKernel:
    """Weight (d, kernel) of a convolution, bias (d) or None, and the activation that is applied to the sum: one of
    `ACTIVATIONS`.

    The weight's last column multiplies the token itself, the column before it the previous token, and so on.
    """

    weight: Float[Tensor, "d kernel"]
    bias: Float[Tensor, " d"] | None = None
    activation: str = "identity"

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (kernel, d), whose first row multiplies the token itself, and the bias, both in float32."""
        weight = self.weight.detach().float().t().flip(0).contiguous()
        return weight, None if self.bias is None else self.bias.detach().float().contiguous()


def previous_rows(cu_seqlens: Int[Tensor, " n_sequences_plus_1"], forks: Sequence[Fork] = ()) -> Int[Tensor, " n"]:
    """Return the row before each row in its sequence, -1 for the first of a sequence, as int32 in host memory.

    ``cu_seqlens`` are the bounds of the sequences. The first row of a branch comes after the last one of its stem.
    """
    bounds = cu_seqlens.tolist()
    previous = torch.arange(-1, bounds[-1] - 1, dtype=torch.int32)
    starts = [start for start, end in pairwise(bounds) if end > start]
    before = dict.fromkeys(starts, -1)
    for fork in sorted(forks, key=lambda fork: fork.stem.stop):  # of several stems the last one comes right before
        before |= {start: fork.stem.stop - 1 for start in starts if fork.branches.start <= start < fork.branches.stop}
    previous[list(before)] = torch.tensor(list(before.values()), dtype=torch.int32)
    return previous


def conv_forward(
    given: GatedInput, kernel: ConvKernel, previous: Int[Tensor, " n"], *, backend: str | None = None
) -> Float[Tensor, "n d"]:
    """Return ``after · act(bias + Σ_j weight[:, -1 - j] z[j rows before])`` with ``z = before · x``.

    ``previous`` are the rows of `previous_rows`, each smaller than its own number. z is rounded to x's dtype, as a
    state keeps it; all else is computed in float32 and rounded once. Raises ShapeError if the parts do not fit, and
    ConfigError for an unknown activation.
    """
    require_fitting(given, kernel, previous)
    y: Tensor = implementation("conv.conv_forward", given.x.device, backend)(given, kernel, previous)
    return y


def conv_backward(
    dy: Float[Tensor, "n d"],
    given: GatedInput,
    kernel: ConvKernel,
    previous: Int[Tensor, " n"],
    *,
    owns_dy: bool = False,
    owns_inputs: bool = False,
    backend: str | None = None,
) -> tuple[GatedInput, Float[Tensor, "n d"]]:
    """Return the gradients with respect to x and its gates, and the output, which the same pass computes for the next
    layer's backward pass.

    ``owns_inputs``: the gradients are written into the tensors of ``given``, and these are returned. ``owns_dy``: the
    output is written into dy, and dy is returned.
    """
    require_fitting(given, kernel, previous)
    if dy.shape != given.x.shape:
        raise ShapeError(
            f"the gradient of a convolution has its input's shape {tuple(given.x.shape)}; given {_told(dy)}"
        )
    run = implementation("conv.conv_backward", given.x.device, backend)
    gradients, y = run(dy, given, kernel, previous, (owns_inputs, owns_dy))
    return gradients, y


def require_fitting(given: GatedInput, kernel: ConvKernel, previous: Tensor | None) -> None:
    """Raise ShapeError or ConfigError if the parts of a convolution do not fit.

    ``previous`` is None if the earlier rows lie in pages.
    """
    if kernel.activation not in ACTIVATIONS:
        raise ConfigError(f"activation {kernel.activation!r} is unknown; there are {list(ACTIVATIONS)}")
    x, gates = given.x, [gate for gate in (given.before, given.after) if gate is not None]
    same = all(gate.shape == x.shape and gate.dtype == x.dtype for gate in gates)
    fits = x.ndim == 2 and kernel.weight.ndim == 2 and len(kernel.weight) == x.shape[1] and kernel.weight.shape[1] > 0
    if previous is not None:
        fits = fits and previous.shape == x.shape[:1] and not previous.is_floating_point() and _comes_before(previous)
    if not same or not fits or (kernel.bias is not None and kernel.bias.shape != x.shape[1:]):
        told = ", ".join(map(_told, (x, *gates)))
        raise ShapeError(
            "a convolution takes x and its gates (n, d) of one dtype, a weight (d, kernel), a bias (d) and, as earlier "
            f"rows, n whole numbers from -1 up to the row itself; given {told}, a weight {tuple(kernel.weight.shape)} "
            f"and {'no' if previous is None else len(previous)} previous rows"
        )


def _comes_before(previous: Tensor) -> bool:
    """Return True if each row's previous row is -1 or comes before it."""
    return bool(((previous >= -1) & (previous < torch.arange(len(previous)))).all())


def _told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"
