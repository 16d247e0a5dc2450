"""Low-rank product of a mixed batch: each row has its own adapter, or none; ranks differ.

``y[n] = onto[n] + scale_k B_k A_k x[n]`` with ``k = row_to_adapter[n]``: the SGMV of Chen et al. 2023 (arXiv
2310.18547), with gradients. Layers that share their input (q, k, v; gate and up) are one call, which reads x once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.ops.dispatch import implementation
from veneer.ops.dropout import Mask, require_fit


class Run(NamedTuple):
    """Rows from ``start`` up to ``stop`` of a batch, to which one adapter applies."""

    adapter: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AdapterRuns:
    """Runs of a batch of ``n_rows`` rows. Each run has one adapter, and runs do not overlap. Rows in no run have no
    adapter.
    """

    runs: tuple[Run, ...]
    n_rows: int

    def times(self, n: int) -> AdapterRuns:
        """Return the runs of a batch in which each row is divided into ``n`` rows, for example a sequence into
        tokens."""
        if n == 1:
            return self
        return AdapterRuns(tuple(Run(k, start * n, stop * n) for k, start, stop in self.runs), self.n_rows * n)

    def part(self, first: int, last: int) -> AdapterRuns:
        """Return the runs within the rows from ``first`` up to ``last``, renumbered so that ``first`` is row 0."""
        if (first, last) == (0, self.n_rows):
            return self
        cut = (Run(k, max(start, first) - first, min(stop, last) - first) for k, start, stop in self.runs)
        return AdapterRuns(tuple(run for run in cut if run.start < run.stop), last - first)

    def with_gaps(self) -> Iterator[Run]:
        """Iterate over the runs in order. Rows without an adapter are runs of adapter -1."""
        reached = 0
        for run in sorted(self.runs, key=lambda run: run.start):
            if run.start > reached:
                yield Run(-1, reached, run.start)
            yield run
            reached = run.stop
        if reached < self.n_rows:
            yield Run(-1, reached, self.n_rows)

    def row_to_adapter(self, device: torch.device) -> Int[Tensor, " n"]:
        """Return the index of each row's adapter; -1 for a row without one."""
        found = torch.full((self.n_rows,), -1)
        for adapter, start, stop in self.runs:
            found[start:stop] = adapter
        return found.to(device)


Factors = tuple[Tensor | None, ...] | Tensor
"""Factor of each adapter's pair on one layer, or its gradient: a stack, or None where an adapter has no pair."""


@dataclass(frozen=True, slots=True)
class LowRankGroup:
    """Low-rank pairs of all adapters on one layer: ``a[k] (r_k, i)``, ``b[k] (o, r_k)`` and their scales.

    ``a[k]`` and ``b[k]`` are None if adapter k has no pair there. If all adapters have pairs of one rank, ``a`` and
    ``b`` may be stacks (adapters, r, i) and (adapters, o, r), and so are their gradients. ``masks[k]`` drops values of
    the x that a[k] reads; without masks nothing is dropped.
    """

    a: Factors
    b: Factors
    scales: tuple[float, ...]
    masks: tuple[Mask | None, ...] = ()

    def mask_of(self, adapter: int) -> Mask | None:
        """Return the mask on the input of one adapter's a, if there is any."""
        return self.masks[adapter] if self.masks else None


def add_grouped_low_rank(
    x: Float[Tensor, "n i"],
    groups: Sequence[LowRankGroup],
    rows: AdapterRuns,
    ys: Sequence[Float[Tensor, "n _"]],
    *,
    backend: str | None = None,
) -> Tensor:
    """Add ``scale * B A drop(x)`` to the outputs of layers that share their input, in place.

    Each row takes the pair of its own adapter; a row without an adapter is unchanged, and an adapter may have no rows.
    Factors may be wider than x (float32 with bf16): kernels round them to bf16 for the product with a bf16 x. Sums are
    float32 and rounded once. Returns the tensor that `grouped_low_rank_backward` of the same back end reads besides x.
    Raises ShapeError if the ids of a mask are not those of x's rows.
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
) -> tuple[Float[Tensor, "n i"] | None, list[Factors], list[Factors]]:
    """Return the gradients of `add_grouped_low_rank` in x (None unless ``input_grad``), and in each group's a and b.

    ``u`` is the tensor that `add_grouped_low_rank` returned. Gradients in a and b are in at least float32.
    """
    kernel = implementation("grouped_low_rank.backward", x.device, backend)
    dx, das, dbs = kernel(dys, x, u, groups, rows, input_grad)
    das = [_as_given(group.a, da) for group, da in zip(groups, das, strict=True)]
    return dx, das, [_as_given(group.b, db) for group, db in zip(groups, dbs, strict=True)]


def _as_given(factors: Factors, gradients: Factors) -> Factors:
    """Return the gradients as a stack if the factors are one."""
    if isinstance(factors, Tensor) and not isinstance(gradients, Tensor):
        return torch.stack([gradient for gradient in gradients if gradient is not None])
    return gradients
