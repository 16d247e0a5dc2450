"""Low-rank product of a mixed batch: each row has its own adapter, or none; ranks differ.

``y[n] = onto[n] + scale_k B_k A_k x[n]`` with ``k = row_to_adapter[n]``: the SGMV of Chen et al. 2023 (arXiv
2310.18547), with gradients. Layers that share their input (q, k, v; gate and up) are one call, which reads x once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.dropout import Mask, require_fit


class Run(NamedTuple):
    """Rows from ``start`` to ``stop`` that take the pairs of one adapter."""

    adapter: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AdapterRuns:
    """Runs of a batch of ``n_rows`` rows, one adapter each, without overlap; other rows have none."""

    runs: tuple[Run, ...]
    n_rows: int

    @classmethod
    def of(cls, row_to_adapter: Int[Tensor, " n"]) -> AdapterRuns:
        """Return the runs of rows, given each row's adapter, -1 for none."""
        n_rows = len(row_to_adapter)
        changes = (row_to_adapter[1:] != row_to_adapter[:-1]).nonzero()[:, 0] + 1
        bounds = [0, *changes.tolist(), n_rows] if n_rows else [0]
        owners = row_to_adapter[bounds[:-1]].tolist()
        runs = zip(owners, bounds[:-1], bounds[1:], strict=True)
        return cls(tuple(Run(*run) for run in runs if run[0] >= 0), n_rows)

    def times(self, n: int) -> AdapterRuns:
        """Return the runs after each row becomes ``n`` rows, for example tokens."""
        if n == 1:
            return self
        return AdapterRuns(tuple(Run(k, start * n, stop * n) for k, start, stop in self.runs), self.n_rows * n)

    def part(self, first: int, last: int) -> AdapterRuns:
        """Return the runs of the rows from ``first`` up to ``last``, counted from the first of them."""
        if (first, last) == (0, self.n_rows):
            return self
        cut = (Run(k, max(start, first) - first, min(stop, last) - first) for k, start, stop in self.runs)
        return AdapterRuns(tuple(run for run in cut if run.start < run.stop), last - first)

    def with_gaps(self) -> Iterator[Run]:
        """Iterate over the runs in order, and between them, as adapter -1, over the rows that have none."""
        reached = 0
        for run in sorted(self.runs, key=lambda run: run.start):
            if run.start > reached:
                yield Run(-1, reached, run.start)
            yield run
            reached = run.stop
        if reached < self.n_rows:
            yield Run(-1, reached, self.n_rows)

    def row_to_adapter(self, device: torch.device) -> Int[Tensor, " n"]:
        """Return the adapter of each row, -1 for none."""
        found = torch.full((self.n_rows,), -1)
        for adapter, start, stop in self.runs:
            found[start:stop] = adapter
        return found.to(device)


@dataclass(frozen=True, slots=True)
class LowRankGroup:
    """Pairs of all adapters on one layer: ``a[k] (r_k, i)``, ``b[k] (o, r_k)`` and their scales.

    ``a[k]`` and ``b[k]`` are None if adapter k has no pair there. ``masks[k]`` drops values of the x that a[k] reads;
    without masks nothing is dropped.
    """

    a: tuple[Tensor | None, ...]
    b: tuple[Tensor | None, ...]
    scales: tuple[float, ...]
    masks: tuple[Mask | None, ...] = ()

    def mask_of(self, adapter: int) -> Mask | None:
        """Return the mask on the input of one adapter's a, if there is any."""
        return self.masks[adapter] if self.masks else None


Gradients = tuple[Tensor | None, ...]


def grouped_low_rank(
    x: Float[Tensor, "n i"],
    a_list: Sequence[Float[Tensor, "_ i"]],
    b_list: Sequence[Float[Tensor, "o _"]],
    scales: Sequence[float],
    row_to_adapter: Int[Tensor, " n"],
    *,
    onto: Float[Tensor, "n o"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "n o"]:
    """Return ``onto + scale * B A x`` with each row's own adapter, in onto's dtype.

    Without ``onto`` the result is ``scale * B A x`` in x's dtype. ``row_to_adapter`` indexes the lists, in any order. A
    row with -1 has no adapter, and an adapter may have no rows. Factors may be wider than x (float32 with bf16): the
    kernels round them to bf16 for the product with a bf16 x. Sums are float32 and rounded once. The gradient flows to
    x, onto, every a and every b, each in its own dtype.

    Raises ShapeError if something does not fit.
    """
    _check(x, a_list, b_list, scales, row_to_adapter)
    if onto is not None and onto.shape != (x.shape[0], b_list[0].shape[0]):
        raise ShapeError(f"onto is {tuple(onto.shape)}; the product is {(x.shape[0], b_list[0].shape[0])}")
    how = (tuple(scales), AdapterRuns.of(row_to_adapter), backend)
    out: Tensor = _GroupedLowRank.apply(x, onto, how, *a_list, *b_list)  # type: ignore[no-untyped-call]
    return out


def add_grouped_low_rank(
    x: Float[Tensor, "n i"],
    groups: Sequence[LowRankGroup],
    rows: AdapterRuns,
    ys: Sequence[Float[Tensor, "n _"]],
    *,
    backend: str | None = None,
) -> Tensor:
    """Add ``scale * B A drop(x)`` to the outputs of layers that share their input, in place.

    Returns the tensor that `grouped_low_rank_backward` of the same back end reads besides x. Raises ShapeError if the
    ids of a mask are not those of x's rows.
    """
    for mask in (mask for group in groups for mask in group.masks if mask is not None):
        require_fit(x, mask.key, mask.ids)
    u: Tensor = implementation("grouped_low_rank.forward", x.device, backend)(x, groups, rows, ys)
    return u


def grouped_low_rank_backward(
    dys: Sequence[Float[Tensor, "n _"]],
    x: Float[Tensor, "n i"],
    u: Tensor,
    groups: Sequence[LowRankGroup],
    rows: AdapterRuns,
    *,
    input_grad: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "n i"] | None, list[Gradients], list[Gradients]]:
    """Return the gradients of `add_grouped_low_rank` in x (None if not asked for), and in the a and b of each group.

    Those in a and b are in at least float32.
    """
    kernel = implementation("grouped_low_rank.backward", x.device, backend)
    dx, das, dbs = kernel(dys, x, u, groups, rows, input_grad)
    return dx, das, dbs


class _GroupedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, how: tuple[tuple[float, ...], AdapterRuns, str | None], *pairs: Tensor
    ) -> Tensor:
        scales, rows, backend = how
        group = _group(pairs, scales)
        y = x.new_zeros(x.shape[0], pairs[-1].shape[0]) if onto is None else onto.clone()
        u = add_grouped_low_rank(x, [group], rows, [y], backend=backend)
        ctx.save_for_backward(x, u, *pairs)
        ctx.how, ctx.adds = how, onto is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, *pairs = ctx.saved_tensors
        scales, rows, backend = ctx.how
        dx, (das,), (dbs,) = grouped_low_rank_backward(
            [dy], x, u, [_group(pairs, scales)], rows, input_grad=ctx.needs_input_grad[0], backend=backend
        )
        grads = (None if g is None else g.to(p.dtype) for g, p in zip((*das, *dbs), pairs, strict=True))
        return dx, dy if ctx.adds else None, None, *grads


def _group(pairs: Sequence[Tensor], scales: tuple[float, ...]) -> LowRankGroup:
    half = len(scales)
    return LowRankGroup(tuple(pairs[:half]), tuple(pairs[half:]), scales)


def _check(
    x: Tensor, a_list: Sequence[Tensor], b_list: Sequence[Tensor], scales: Sequence[float], row_to_adapter: Tensor
) -> None:
    if not len(a_list) == len(b_list) == len(scales) or not a_list:
        raise ShapeError(
            f"grouped_low_rank takes one a, b and scale per adapter, and at least one adapter; given {len(a_list)}, "
            f"{len(b_list)} and {len(scales)}"
        )
    wrong = [
        f"adapter {j}: a {tuple(a.shape)}, b {tuple(b.shape)}"
        for j, (a, b) in enumerate(zip(a_list, b_list, strict=True))
        if a.shape[1] != x.shape[1] or b.shape != (b_list[0].shape[0], a.shape[0])
    ]
    if wrong or row_to_adapter.shape != x.shape[:1]:
        raise ShapeError(
            f"x is {tuple(x.shape)} and row_to_adapter {tuple(row_to_adapter.shape)}; give an index for "
            f"each row of x, and for each adapter a (r, {x.shape[1]}) and b ({b_list[0].shape[0]}, r)"
            + "".join(f"; {found}" for found in wrong)
        )
    if len(row_to_adapter) and not (int(row_to_adapter.min()) >= -1 and int(row_to_adapter.max()) < len(a_list)):
        raise ShapeError(
            f"row_to_adapter holds indices below -1 or above the {len(a_list)} adapters: "
            f"give -1 (none) to {len(a_list) - 1}"
        )
