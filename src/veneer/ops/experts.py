"""Experts of a mixture: which of them a row goes through, and the weighted sum of their outputs.

A row's result does not depend on the other rows: its sums run in the order of its choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.glu import UNITS
from veneer.ops.packed import ROWS, PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.pairs import PackedPairs

Shared = tuple[Tensor | None, Tensor | None]
"""Output of a shared expert, and its gate."""
MOST_EXPERTS = 1024
"""As csrc/experts/kernels.cpp has it."""


class ExpertSegment(NamedTuple):
    """Rows from ``start`` up to ``stop``, whose experts add the low-rank ``pairs`` of one adapter.

    The first pairs are those of gate and up, the second those of down. None adds nothing.
    """

    pairs: tuple[PackedPairs | None, PackedPairs | None]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Choice of ``top_k`` of ``n_experts`` by their scores, and the weights of the chosen.

    The value of an expert is the softmax over all scores, or the ``sigmoid`` of its own score. Experts are chosen by
    value plus bias, the largest first, within the best ``kept_groups`` of ``n_groups`` groups. Groups are ranked by the
    sum of their two largest values. The weights are the values without the bias. If ``normalized``, they are divided by
    their sum. They are multiplied by ``scale`` last.

    Raises ConfigError for numbers that do not fit.
    """

    n_experts: int
    top_k: int
    values: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    n_groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.n_experts <= MOST_EXPERTS or not 1 <= self.kept_groups <= self.n_groups:
            raise ConfigError(
                f"a router has 1 to {MOST_EXPERTS} experts and keeps 1 to all of its groups; given {self.n_experts} "
                f"experts, {self.kept_groups} of {self.n_groups} groups"
            )
        size, left = divmod(self.n_experts, self.n_groups)
        if left or not 1 <= self.top_k <= size * self.kept_groups:
            raise ConfigError(
                f"{self.top_k} experts of {self.n_experts} cannot be chosen from {self.kept_groups} of {self.n_groups} "
                "groups: groups are equally large, and those kept have at least top_k experts"
            )


@dataclass(frozen=True, slots=True, eq=False)
class PackedStack:
    """Packed weights ``W (experts, o, i)`` of one linear layer of all experts, in one tensor of panels.

    ``first`` is the first expert's weight; its panels are the beginning of ``panels``. ``bias`` (experts, o), if there
    is one, is contiguous and in the dtype of the rows.
    """

    panels: Tensor
    n_experts: int
    first: PackedWeight | PackedCodes
    bias: Tensor | None = None

    @classmethod
    def of(cls, weights: Iterable[PackedWeight] | Iterable[PackedCodes]) -> PackedStack:
        """Return the packed weights of the experts as one stack, a copy.

        Raises ShapeError if they differ in shape or kind.
        """
        each: list[PackedWeight | PackedCodes] = list(weights)
        if len({_kind(weight) for weight in each}) != 1:
            raise ShapeError("a stack is made of one or more packed weights of one shape and kind")
        panels, first = torch.cat([weight.panels for weight in each]), each[0]
        return cls(panels, len(each), replace(first, panels=panels[: len(first.panels)]))

    @classmethod
    def pack(cls, weights: Float[Tensor, "experts o i"]) -> PackedStack:
        """Pack dense weights as a copy, one expert at a time, so that no second copy is made."""
        first = PackedWeight.pack(weights[0].contiguous())
        panels = first.panels.new_empty(len(weights), len(first.panels))
        for own, weight in zip(panels, weights, strict=True):
            own.copy_(PackedWeight.pack(weight.contiguous()).panels)
        flat = panels.flatten()
        return cls(flat, len(weights), replace(first, panels=flat[: len(first.panels)]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (experts, o, i)."""
        return self.n_experts, *self.first.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.first.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, with their padding."""
        return self.panels.nbytes

    def expert(self, number: int) -> PackedWeight | PackedCodes:
        """Return the weight (o, i) of one expert, which shares memory with the stack."""
        size = len(self.first.panels)
        return replace(self.first, panels=self.panels[number * size : (number + 1) * size])


def route(
    scores: Float[Tensor, "n experts"],
    router: Router,
    bias: Float32[Tensor, " experts"] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Int64[Tensor, "n top_k"], Float32[Tensor, "n top_k"]]:
    """Return the experts of each row, the best first, and their weights. Of equal values the first are chosen.

    ``bias`` is added to the values by which experts are chosen. Computed in float32. Raises ShapeError.
    """
    fits = scores.ndim == 2 and scores.shape[1] == router.n_experts and scores.is_floating_point()
    if not fits or (bias is not None and (bias.shape != (router.n_experts,) or bias.dtype != torch.float32)):
        raise ShapeError(
            f"a router of {router.n_experts} experts takes scores (n, {router.n_experts}) of floating-point numbers "
            f"and a bias of float32; given {tuple(scores.shape)} {scores.dtype} and "
            f"{None if bias is None else (tuple(bias.shape), bias.dtype)}"
        )
    ids, weights = implementation("experts.route", scores.device, backend)(scores, router, bias)
    return ids, weights


def mix(
    x: Float[Tensor, "n d"],
    ids: Int64[Tensor, "n top_k"],
    weights: Float32[Tensor, "n top_k"],
    stacks: tuple[PackedStack, PackedStack],
    activation: str,
    *,
    shared: Float[Tensor, "n d"] | None = None,
    shared_gate: Float[Tensor, "n 1"] | None = None,
    segments: Sequence[ExpertSegment] = (),
    backend: str | None = None,
) -> Float[Tensor, "n d"]:
    """Return ``Σ weights · down(activation(gate x) · up x)`` over the experts ``ids`` of each row. For inference alone.

    ``shared`` is added to the sum, times the sigmoid of ``shared_gate`` if that is given. ``segments`` are the rows of
    adapters, in order; their pairs are in the dtype of the stacks.

    ``stacks`` are those of gate and up (2 · width, d), and of down (d, width). ``activation`` is one of
    `veneer.ops.glu.UNITS`, which says how the rows of gate and up lie. Products, the
    activation and the sum are float32, each rounded once to x's dtype. Raises ShapeError and ConfigError.
    """
    _check(x, ids, weights, stacks, activation)
    _check_segments(len(x), stacks, segments)
    if shared_gate is not None and shared is None:
        raise ShapeError("shared_gate multiplies shared, and shared is None: give both, or leave shared_gate out")
    for name, given, wide in (("shared", shared, x.shape[1]), ("shared_gate", shared_gate, 1)):
        if given is not None and (given.shape != (len(x), wide) or given.dtype != x.dtype):
            raise ShapeError(
                f"{name} must be ({len(x)}, {wide}) of {x.dtype}; given {tuple(given.shape)} {given.dtype}"
            )
    kernel = implementation("experts.mix", x.device, backend)
    y: Tensor = kernel(x, ids, weights, stacks, activation, (shared, shared_gate), segments)
    return y


def _check(x: Tensor, ids: Tensor, weights: Tensor, stacks: tuple[PackedStack, PackedStack], activation: str) -> None:
    if activation not in UNITS:
        raise ConfigError(f"activation {activation!r} is unknown; there are {list(UNITS)}")
    inner, down = stacks
    n_experts, d, width = down.shape
    if inner.shape != (n_experts, 2 * width, d) or inner.dtype != down.dtype:
        raise ShapeError(
            f"stacks of a mixture are (experts, 2 width, d) and (experts, d, width) of one dtype; given {inner.shape} "
            f"{inner.dtype} and {down.shape} {down.dtype}"
        )
    for own, wide in ((inner.bias, 2 * width), (down.bias, d)):
        if own is not None and (own.shape != (n_experts, wide) or own.dtype != x.dtype or not own.is_contiguous()):
            raise ShapeError(
                f"a bias of experts must be contiguous ({n_experts}, {wide}) of {x.dtype}; given {tuple(own.shape)} "
                f"{own.dtype}"
            )
    if x.ndim != 2 or x.shape[1] != d or x.dtype not in ROWS:
        raise ShapeError(f"x must be (n, {d}) of float32 or bfloat16; given {tuple(x.shape)} {x.dtype}")
    alike = ids.ndim == 2 and len(ids) == len(x) and ids.shape == weights.shape
    if not alike or ids.dtype != torch.int64 or weights.dtype != torch.float32:
        raise ShapeError(
            f"experts are chosen by ids (n, top_k) of int64 and weights of float32; given {tuple(ids.shape)} "
            f"{ids.dtype} and {tuple(weights.shape)} {weights.dtype} for {len(x)} rows"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_experts:
        raise ShapeError(f"there are experts 0 to {n_experts - 1}; given ids from {int(ids.min())} to {int(ids.max())}")


def _check_segments(n: int, stacks: tuple[PackedStack, PackedStack], segments: Sequence[ExpertSegment]) -> None:
    reached = 0
    for pairs, start, stop in segments:
        fits = all(own is None or fits_stack(own, stack) for own, stack in zip(pairs, stacks, strict=True))
        if not fits or not reached <= start <= stop <= n:
            given = [None if own is None else (own.n_experts, own.out_features, own.in_features) for own in pairs]
            raise ShapeError(
                f"segments of {n} rows follow one another, and their pairs fit stacks {[s.shape for s in stacks]} of "
                f"{stacks[0].dtype}; given rows {start} to {stop} after {reached}, with experts, outputs and inputs "
                f"{given}"
            )
        reached = stop


def fits_stack(pairs: PackedPairs, stack: PackedStack) -> bool:
    """Return True if the pairs' sizes and dtype are those of the stack, and they apply nothing between or after their
    products.
    """
    shape = (pairs.n_experts, *pairs.out_features, pairs.in_features)
    return shape == stack.shape and pairs.dtype == stack.dtype and pairs.middle is None


def _kind(weight: PackedWeight | PackedCodes) -> tuple[object, ...]:
    coded = (weight.coding_number, weight.unit) if isinstance(weight, PackedCodes) else ()
    return type(weight), weight.shape, weight.dtype, *coded
