"""Nearest update of a given rank (Eckart and Young 1936), with its truncation error."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.core.svd import svd_of_factors
from veneer.errors import CompositionError

_LEAST = torch.finfo(torch.float64).tiny  # of a singular value that is divided by: an update of zeros stays one


def truncate_dense(update: Float[Tensor, "o i"], rank: int) -> tuple[LinearDelta, float]:
    """Return the best rank-r factors ``B = U S`` and ``A = Vᵀ``, and the relative Frobenius error of ``B A``.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix. In float64 they are as exact as
    those of an SVD in float32, in a third of its time.
    """
    _check_rank(rank, min(update.shape))
    is_wide, tall = update.shape[1] > update.shape[0], _tall(update)
    energy, v = torch.linalg.eigh(tall.T @ tall)  # in ascending order
    s, v = energy.flip(0).clamp(min=0.0).sqrt(), v.flip(1)[:, :rank]
    b, a = (v * s[:rank], (tall @ v / s[:rank].clamp(min=_LEAST)).T) if is_wide else (tall @ v, v.T)
    record = LinearDelta.pair(a.to(update.dtype).contiguous(), b.to(update.dtype).contiguous())
    return record, _error(s, rank)


def truncate_factors(record: LinearDelta, rank: int) -> tuple[LinearDelta, float]:
    """Return the best rank-r factors of ``scale B A`` and their error, without forming the product."""
    u, s, vt = svd_of_factors(record)
    _check_rank(rank, len(s))
    return LinearDelta.pair(vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()), _error(s, rank)


def rank_within(update: Float[Tensor, "o i"], error: float) -> int:
    """Return the smallest rank (at least 1) whose best factors have at most this relative Frobenius error."""
    tall = _tall(update)
    energy = torch.linalg.eigvalsh(tall.T @ tall).flip(0).clamp(min=0.0)
    lost = energy.flip(0).cumsum(0).flip(0)  # lost[r]: what rank r leaves out
    return max(int((lost > error**2 * lost[0]).sum()), 1)


def _tall(update: Tensor) -> Tensor:
    """The update in float64, transposed if it has more columns than rows."""
    return (update.T if update.shape[1] > update.shape[0] else update).double()


def _error(s: Tensor, rank: int) -> float:
    total, lost = float(s.square().sum()), float(s[rank:].square().sum())
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _check_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise CompositionError(f"rank {rank} is not possible here: choose between 1 and {largest}")
