"""PEFT's "linear": A added to A and B added to B.

The product has the cross terms ``B_i A_j``, so it is not the sum of the updates. It keeps its own name for reproducing
PEFT's results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta


def factorwise(updates: Sequence[Update], weights: Sequence[float]) -> LinearDelta:
    """Return ``A = Σ sign(w) √(|w| s) A_i`` and ``B = Σ √(|w| s) B_i`` over low-rank updates of one rank.

    Raises CompositionError if ranks differ, a record scales its layer, or its scale is negative.
    """
    ranks = {u.record.rank for u in updates}
    pairs = [u.record.low_rank.plain for u in updates if u.is_lowrank and u.record.low_rank is not None]
    if len(ranks) != 1 or len(pairs) < len(updates) or any(pair.scale < 0 for pair in pairs):
        raise CompositionError(
            f"how='factorwise' needs plain low-rank updates of one rank with positive scales, but ranks are "
            f"{sorted(ranks)}: "
            "use 'linear', which is exact for all of them"
        )
    roots = [math.sqrt(abs(w) * pair.scale) for pair, w in zip(pairs, weights, strict=True)]
    each = zip(pairs, weights, roots, strict=True)
    a = torch.stack([pair.a * math.copysign(root, w) for pair, w, root in each])
    b = torch.stack([pair.b * root for pair, root in zip(pairs, roots, strict=True)])
    return LinearDelta.pair(a.sum(dim=0), b.sum(dim=0))
