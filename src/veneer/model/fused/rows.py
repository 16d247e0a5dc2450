"""Mixed batches in fused blocks: the low-rank pairs of all adapters behind one another, and which rows take which."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch

from veneer.core.records import LinearDelta
from veneer.model.routing import Routing
from veneer.ops.projection import LowRankRows, Run


def joined_pairs(records: Mapping[str, LinearDelta], routing: Routing) -> tuple[LinearDelta, LowRankRows]:
    """One record that holds the pairs of all of these, with gradients to each, and the runs of rows that take them."""
    pairs = [(r.a, r.b) for r in records.values() if r.a is not None and r.b is not None]
    joined = LinearDelta(a=torch.cat([a for a, _ in pairs]), b=torch.cat([b for _, b in pairs], dim=1))
    return joined, LowRankRows(_runs(records, routing), len(routing.names))


def _runs(records: Mapping[str, LinearDelta], routing: Routing) -> tuple[Run, ...]:
    ranks, end = {}, 0
    for name, record in records.items():
        ranks[name] = slice(end, end + record.rank)
        end += record.rank
    found, start = [], 0
    for name, rows in groupby(routing.names):
        stop = start + len(list(rows))
        if name in records:
            found.append(Run(start, stop, ranks[name], records[name].scale))
        start = stop
    return tuple(found)
