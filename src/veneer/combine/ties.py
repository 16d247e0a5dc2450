"""TIES: elect a sign for each entry and average the updates that agree with it (Yadav et al. 2023,
arXiv:2306.01708).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Vote = Literal["total", "frequency"]
Divisor = Literal["count", "weights", "none"]


def elect_and_merge(
    updates: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    vote: Vote = "total",
    divisor: Divisor = "count",
) -> Float[Tensor, "*shape"]:
    """Elect the sign of each entry, then merge the updates that carry it (algorithm 1, steps 2 and 3), already trimmed.

    ``vote``: the sign of the sum of values ("total", the paper's) or of the sum of signs ("frequency").
    ``divisor``: "count" is the paper's mean over those that agree, each times its weight, with the vote on
    unweighted values. "weights" lets the weights vote as well and divides by the weights of those that agree, so
    that they do not set the size. With all weights at one both are the same. "none" lets the weights vote and divides
    by nothing.
    """
    ballots = updates if divisor == "count" else [u * w for u, w in zip(updates, weights, strict=True)]
    votes = torch.zeros_like(updates[0])
    for ballot in ballots:
        votes += ballot.sign() if vote == "frequency" else ballot
    positive = votes >= 0
    merged, share = torch.zeros_like(votes), torch.zeros_like(votes)
    for update, ballot, weight in zip(updates, ballots, weights, strict=True):
        agrees = torch.where(positive, ballot > 0, ballot < 0)
        merged.add_(update * agrees, alpha=weight)
        share.add_(agrees, alpha=1.0 if divisor == "count" else weight)
    return merged if divisor == "none" else merged / torch.where(share != 0, share, 1.0)
