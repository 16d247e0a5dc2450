"""The low-rank parts of a mixed batch by one kernel, however many adapters share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.ops.grouped_low_rank import grouped_low_rank


def add_grouped(y: Tensor, x: Tensor, deltas: Sequence[LinearDelta], row_index: Tensor) -> Tensor:
    """``core.rows.add_lowrank`` as one grouped product, rounded once to y's dtype."""
    pairs = [(index, d.a, d.b, d.scale) for index, d in enumerate(deltas) if d.a is not None and d.b is not None]
    if not pairs:
        return y
    indices, a_list, b_list, scales = zip(*pairs, strict=True)
    place = torch.full((len(deltas),), -1)
    place[list(indices)] = torch.arange(len(pairs))
    each = place.to(row_index.device)[row_index].repeat_interleave(x[0].numel() // x.shape[-1])
    flat, onto = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return grouped_low_rank(flat, a_list, b_list, scales, each, onto=onto).view(y.shape)
