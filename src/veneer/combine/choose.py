"""Combines several updates of one layer into one, by the name of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from veneer.combine.factorwise import factorwise
from veneer.combine.scales import combined_scales, only_scales
from veneer.combine.sparsify import draw_of, drop_and_rescale, largest
from veneer.combine.ties import Vote, elect_and_merge
from veneer.combine.truncate import rank_within, truncate_dense, truncate_factors
from veneer.combine.update import Update, concatenated
from veneer.errors import CompositionError
from veneer.plain.field_types import check, fits
from veneer.records.deltas import LinearDelta

Way = Literal["linear", "cat", "svd", "factorwise", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
WAYS: tuple[str, ...] = get_args(Way)
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Method to combine updates, and its settings.

    ``how`` is one of:

    - "linear": the weighted sum. It is exact, with ranks added up, if all updates are low-rank and no ``rank`` is
      given. Otherwise it is truncated (a DoRA update has full rank).
    - "cat": the exact sum, never truncated.
    - "svd": truncates to ``rank``, or to the largest rank of the inputs.
    - "factorwise": adds A to A and B to B, which leaves cross terms.
    - all others: combine whole updates and truncate to ``rank`` (default: the largest of the inputs).

    ``density``: the share of entries that "ties", "magnitude_prune" and "dare_…" keep. ``seed`` is that of DARE's draw.
    """

    how: Way = "linear"
    rank: int | None = None
    density: float | None = None
    vote: Vote = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, self._problems, CompositionError)

    def _problems(self) -> list[str]:
        problems = []
        if self.how in SPARSE and self.density is None:
            problems.append(f"how={self.how!r} needs a density in (0, 1]")
        if self.how not in SPARSE and self.density is not None:
            problems.append(f"density has no meaning for how={self.how!r}; it belongs to {list(SPARSE)}. Leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            problems.append(f"density={self.density} must lie in (0, 1]")
        if self.rank is not None and (self.rank < 1 or self.how in ("cat", "factorwise")):
            problems.append(
                f"rank={self.rank} must be at least 1, and how={self.how!r} "
                + ("sets it itself" if self.rank >= 1 else "too")
            )
        return problems


def combine(
    updates: Sequence[Update], weights: Sequence[float], plan: Combination, name: str = ""
) -> tuple[LinearDelta, float]:
    """Return one record that changes the layer as planned, and the relative Frobenius error of its rank reduction.

    The layer's ``name`` seeds DARE's draw, so that layers of one shape are not pruned alike. Weights may be negative.
    Biases in the records are left to the caller.
    """
    if len(updates) != len(weights) or not updates:
        raise CompositionError(
            f"{len(updates)} updates and {len(weights)} weights: give one weight for each of at least one adapter"
        )
    if not all(fits(w, float) for w in weights):
        raise CompositionError(f"weights={list(weights)!r} must be finite numbers")
    if only_scales(updates):
        return combined_scales(updates, weights, plan.how), 0.0
    if plan.how == "factorwise":
        return factorwise(updates, weights), 0.0
    lowrank = all(u.is_lowrank for u in updates)
    if plan.how == "cat" and not lowrank:
        raise CompositionError(
            "how='cat' needs low-rank updates; an adapter that scales or rotates its layer, or changes it as a whole "
            "(DoRA, IA3, OFT, LoKr), needs 'linear' with a rank"
        )
    if plan.how in ("linear", "cat", "svd") and lowrank:
        return _exact_sum(updates, weights, plan)
    return _bring_to_rank(_merged(updates, weights, plan, name), updates, plan)


def rank_needed(updates: Sequence[Update], weights: Sequence[float], plan: Combination, name: str, error: float) -> int:
    """Return the smallest rank whose truncation of this layer's combination has a relative Frobenius error of at most
    ``error``.
    """
    return rank_within(_merged(updates, weights, plan, name), error)


def _exact_sum(updates: Sequence[Update], weights: Sequence[float], plan: Combination) -> tuple[LinearDelta, float]:
    record = concatenated(updates, weights)
    rank = plan.rank or (_default_rank(updates) if plan.how == "svd" else None)
    return (record, 0.0) if rank is None or rank >= record.rank else truncate_factors(record, rank)


def _merged(updates: Sequence[Update], weights: Sequence[float], plan: Combination, name: str) -> Tensor:
    """Return the combined update as a dense matrix."""
    dense = [u.dense() for u in updates]
    density = plan.density or 1.0
    if plan.how in ("ties", "magnitude_prune"):
        dense = [largest(d, density) for d in dense]
    elif plan.how in ("dare_linear", "dare_ties"):
        generator = draw_of(plan.seed, name)
        dense = [drop_and_rescale(d, density, generator) for d in dense]
    if plan.how in ("ties", "dare_ties"):
        return elect_and_merge(dense, weights, plan.vote)
    return sum((w * d for w, d in zip(weights, dense, strict=True)), torch.zeros_like(dense[0]))


def _bring_to_rank(update: Tensor, updates: Sequence[Update], plan: Combination) -> tuple[LinearDelta, float]:
    rank = plan.rank or _default_rank(updates)
    if rank == 0:
        raise CompositionError("none of the adapters has a rank: give the rank of the result")
    return truncate_dense(update, rank)


def _default_rank(updates: Sequence[Update]) -> int:
    """Return the largest rank of the updates, each limited by its layer's smaller width. An output head with few
    classes has a small width.
    """
    pairs = [u.record.low_rank for u in updates]
    return max((min(pair.rank, pair.a.shape[1], len(pair.b)) for pair in pairs if pair is not None), default=0)
