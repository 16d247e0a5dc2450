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
Divisor = Literal["count", "weights"]


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
    that they do not set the size. With all weights at one both are the same.
    """
    stacked = torch.stack(list(updates))
    w = torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
    weighted = stacked * w
    ballot = weighted if divisor == "weights" else stacked
    votes = ballot.sign() if vote == "frequency" else ballot
    sign = torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0).to(stacked.dtype)
    agrees = (ballot.sign() == sign) & (ballot != 0)
    merged = (weighted * agrees).sum(dim=0)
    if divisor == "count":
        return merged / agrees.sum(dim=0).clamp_min(1)
    share = (w * agrees).sum(dim=0)
    return torch.where(share != 0, merged / torch.where(share != 0, share, 1.0), 0.0)
