"""TIES: elect a sign for each entry and average the updates that agree with it.

Source: Yadav et al. 2023, arXiv:2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Vote = Literal["total", "frequency"]
Divisor = Literal["count", "weights", "none"]
BLOCK_VALUES = 1 << 20  # entries are elected apart: what is computed on the way need not be as large as an update


def elect_and_merge(
    updates: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    vote: Vote = "total",
    divisor: Divisor = "count",
) -> Float[Tensor, "*shape"]:
    """Elect the sign of each entry, then merge the trimmed updates that have it (algorithm 1, steps 2 and 3).

    ``vote``: the sign of the sum of values ("total", the paper's) or of the sum of signs ("frequency").

    ``divisor``: "count" is the paper's mean over the updates that agree, each times its weight; the vote is on
    unweighted values. "weights" votes on weighted values and divides by the sum of the weights of the updates that
    agree. If all weights are 1, both are the same. "none" votes on weighted values and does not divide.
    """
    merged = torch.empty_like(updates[0], memory_format=torch.contiguous_format)
    flat = [update.flatten() for update in updates]
    for start in range(0, merged.numel(), BLOCK_VALUES):
        at = slice(start, start + BLOCK_VALUES)
        merged.view(-1)[at] = _elect([update[at] for update in flat], weights, vote, divisor)
    return merged


def _elect(updates: Sequence[Tensor], weights: Sequence[float], vote: Vote, divisor: Divisor) -> Tensor:
    def ballot(update: Tensor, weight: float) -> Tensor:
        return update if divisor == "count" else update * weight

    votes = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        cast = ballot(update, weight)
        votes += cast.sign() if vote == "frequency" else cast
    positive = votes >= 0
    merged, share = torch.zeros_like(votes), torch.zeros_like(votes)
    for update, weight in zip(updates, weights, strict=True):
        cast = ballot(update, weight)
        agrees = torch.where(positive, cast > 0, cast < 0)
        merged.add_(update * agrees, alpha=weight)
        share.add_(agrees, alpha=1.0 if divisor == "count" else weight)
    return merged if divisor == "none" else merged / torch.where(share != 0, share, 1.0)
