"""PEFT's "linear": A added to A and B added to B. Its product has the cross terms ``B_i A_j``, so it is not the sum
of the updates; kept under its own name for those who need to reproduce it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from veneer.combine.update import Update
from veneer.core.records import LinearDelta
from veneer.errors import CompositionError


def factorwise(updates: Sequence[Update], weights: Sequence[float]) -> LinearDelta:
    """``A = Σ sign(w) √(|w| s) A_i`` and ``B = Σ √(|w| s) B_i`` over low-rank updates of one rank.

    Raises CompositionError where ranks differ, or a record scales its layer, or its scale is negative.
    """
    ranks = {u.record.rank for u in updates}
    if len(ranks) != 1 or not all(u.is_lowrank for u in updates) or any(u.record.scale < 0 for u in updates):
        raise CompositionError(
            f"how='factorwise' needs plain low-rank updates of one rank with positive scales, but ranks are "
            f"{sorted(ranks)}: "
            "use 'linear', which is exact for all of them"
        )
    roots = [math.sqrt(abs(w) * u.record.scale) for u, w in zip(updates, weights, strict=True)]
    a = torch.stack(
        [
            u.record.a * math.copysign(root, w)
            for u, w, root in zip(updates, weights, roots, strict=True)
            if u.record.a is not None
        ]
    )
    b = torch.stack([u.record.b * root for u, root in zip(updates, roots, strict=True) if u.record.b is not None])
    return LinearDelta(a=a.sum(dim=0), b=b.sum(dim=0))
