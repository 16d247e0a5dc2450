"""Mixed batches in fused blocks: the low-rank pairs of all adapters of a layer, and which rows take which."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.core.records import LinearDelta
from veneer.model.routing import Routing
from veneer.ops.grouped_low_rank import LowRankGroup
from veneer.ops.projection import LowRankRows


def pairs_of_rows(records: Mapping[str, LinearDelta], routing: Routing) -> LowRankRows:
    """The pairs of these records, in the order in which the routing counts its adapters."""
    found = [records.get(name, LinearDelta()) for name in routing.adapters]
    group = LowRankGroup(tuple(r.a for r in found), tuple(r.b for r in found), tuple(r.scale for r in found))
    return LowRankRows(group, routing.runs)
