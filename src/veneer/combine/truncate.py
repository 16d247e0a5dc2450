"""The nearest update of a given rank (Eckart and Young 1936), with the error that the truncation makes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.errors import CompositionError


def truncate_dense(update: Float[Tensor, "o i"], rank: int) -> tuple[LinearDelta, float]:
    """The best rank-r factors ``B = U S`` and ``A = Vᵀ``, and the relative Frobenius error of ``B A``."""
    _check_rank(rank, min(update.shape))
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    return _keep(u, s, vt, rank)


def truncate_factors(record: LinearDelta, rank: int) -> tuple[LinearDelta, float]:
    """The same for ``scale B A`` without forming it: QR of both factors, then the SVD of an R × R matrix."""
    if record.a is None or record.b is None:
        raise CompositionError("the record has no low-rank part to truncate")
    _check_rank(rank, min(record.rank, record.b.shape[0], record.a.shape[1]))
    wide = torch.promote_types(record.a.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(record.b.to(wide))
    q_a, r_a = torch.linalg.qr(record.a.to(wide).T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T * record.scale, full_matrices=False)
    return _keep(q_b @ u, s, vt @ q_a.T, rank)


def _keep(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> tuple[LinearDelta, float]:
    total = float(s.square().sum())
    lost = float(s[rank:].square().sum())
    record = LinearDelta(a=vt[:rank].contiguous(), b=(u[:, :rank] * s[:rank]).contiguous())
    return record, (lost / total) ** 0.5 if total > 0 else 0.0


def _check_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise CompositionError(f"rank {rank} is not possible here: choose between 1 and {largest}")
