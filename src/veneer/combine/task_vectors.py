"""Task vectors: the changes of a weight by fine-tuning, combined and added to the base's, plain or by TIES or DARE.

Source: Ilharco et al. 2023, arXiv:2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.combine.sparsify import drop_and_rescale, largest
from veneer.combine.ties import Vote, elect_and_merge
from veneer.errors import CompositionError

How = Literal["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """Method to combine task vectors, and its settings.

    - ``how``: "task_arithmetic" is the weighted sum. "ties" keeps the largest entries and those that agree with the
      elected sign. "dare_linear" and "dare_ties" keep a random draw instead.
    - ``density``: the share of entries kept; not for "task_arithmetic".
    - ``normalize``: True divides by a sum of the weights (`divides`); None means True for "ties" alone, as in mergekit.
    - ``vote``: the sign of the sum of weighted values ("total") or of their signs ("frequency").
    - ``scale`` multiplies the result (λ of TIES). ``seed`` is that of DARE's draw.
    """

    how: How = "task_arithmetic"
    density: float | None = None
    normalize: bool | None = None
    vote: Vote = "total"
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.how not in get_args(How):
            problems.append(f"how={self.how!r} must be one of {list(get_args(How))}")
        if (self.density is None) != (self.how == "task_arithmetic"):
            need = "has no meaning for" if self.how == "task_arithmetic" else "in (0, 1] is needed by"
            problems.append(f"density {need} how={self.how!r}")
        if self.density is not None and not 0 < self.density <= 1:
            problems.append(f"density={self.density} must lie in (0, 1]")
        if self.vote not in get_args(Vote):
            problems.append(f"vote={self.vote!r} must be one of {list(get_args(Vote))}")
        if not math.isfinite(self.scale):
            problems.append(f"scale={self.scale} must be a finite number")
        if problems:
            raise CompositionError("; ".join(problems))

    @property
    def divides(self) -> bool:
        """Return True if the result is divided by the sum of the weights; with TIES, of the weights whose vectors have
        the elected sign.
        """
        return self.how == "ties" if self.normalize is None else self.normalize


def merge_task_vectors(
    base: Float[Tensor, "*shape"],
    tuned: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    plan: TaskVectors,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the base's weight plus the task vectors ``tuned - base``, combined as planned, in the dtype of ``base``.

    Computed in at least float32 and rounded once. The order is mergekit's: difference, sparsify, weigh, elect a sign on
    the weighted values, sum, divide. Difference from mergekit: DARE divides by the density, as in its
    paper (section 3.1); mergekit rescales to the original sum of magnitudes.

    Raises CompositionError if there is not one finite weight for each of ``tuned``.
    """
    if len(tuned) != len(weights) or not all(map(math.isfinite, weights)):
        raise CompositionError(
            f"{len(tuned)} tuned models are combined with weights={list(weights)}: give one finite number for each "
            "model"
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    vectors = (_sparsified(_difference(t, base, wide), plan, generator) for t in tuned)
    if plan.how in ("ties", "dare_ties"):
        change = elect_and_merge(list(vectors), weights, plan.vote, "weights" if plan.divides else "none")
    else:  # one vector at a time in memory
        change = torch.zeros_like(base, dtype=wide)
        for weight in weights:
            change.add_(next(vectors), alpha=weight)
        if plan.divides:
            change /= _divisor(weights)
    return change.mul_(plan.scale).add_(base).to(base.dtype)


def _difference(tuned: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    return tuned.to(dtype, copy=True).sub_(base)


def _sparsified(vector: Tensor, plan: TaskVectors, generator: torch.Generator | None) -> Tensor:
    if plan.density is None or plan.density == 1:
        return vector
    if plan.how == "ties":
        return largest(vector, plan.density)
    return drop_and_rescale(vector, plan.density, generator)


def _divisor(weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    if abs(total) < 1e-8:
        raise CompositionError(
            f"the weights {list(weights)} add up to zero, so they cannot be normalized: give others, or turn "
            "normalization off"
        )
    return total
