"""Nearest update of a given rank (Eckart and Young 1936), with its truncation error."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.core.svd import svd_of_factors
from veneer.errors import CompositionError


def truncate_dense(update: Float[Tensor, "o i"], rank: int) -> tuple[LinearDelta, float]:
    """Return the best rank-r factors ``B = U S`` and ``A = Vᵀ``, and the relative Frobenius error of ``B A``."""
    _check_rank(rank, min(update.shape))
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    return _keep(u, s, vt, rank)


def truncate_factors(record: LinearDelta, rank: int) -> tuple[LinearDelta, float]:
    """Return the best rank-r factors of ``scale B A`` and their error, without forming the product."""
    u, s, vt = svd_of_factors(record)
    _check_rank(rank, len(s))
    return _keep(u, s, vt, rank)


def rank_within(update: Float[Tensor, "o i"], error: float) -> int:
    """Return the smallest rank (at least 1) whose best factors have at most this relative Frobenius error."""
    energy = torch.linalg.svdvals(update).double().square()
    lost = energy.flip(0).cumsum(0).flip(0)  # lost[r]: what rank r leaves out
    return max(int((lost > error**2 * lost[0]).sum()), 1)


def _keep(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> tuple[LinearDelta, float]:
    total = float(s.square().sum())
    lost = float(s[rank:].square().sum())
    record = LinearDelta.pair(vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous())
    return record, (lost / total) ** 0.5 if total > 0 else 0.0


def _check_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise CompositionError(f"rank {rank} is not possible here: choose between 1 and {largest}")
