"""Singular value decomposition of a low-rank update, from its factors alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta


def svd_of_factors(record: LinearDelta) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"], Float[Tensor, "r i"]]:
    """Return ``(U, s, Vᵀ)`` with ``scale B A = U diag(s) Vᵀ`` in at least float32, s in falling order.

    QR of both factors, then the SVD of an (R, R) matrix: the update itself is never formed.

    Raises CompositionError for a record without a low-rank part.
    """
    pair = record.low_rank
    if pair is None:
        raise CompositionError(
            "the record has no low-rank part, so there is nothing to decompose: give one with a pair"
        )
    wide = torch.promote_types(pair.a.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(pair.plain_b.to(wide))
    q_a, r_a = torch.linalg.qr(pair.a.to(wide).T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T * pair.scale, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T
