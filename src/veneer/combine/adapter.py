"""Builds a whole adapter from one record for each layer, of a method that can hold these records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.contract import LinearMethod
from veneer.contract.discovery import concrete
from veneer.contract.raised import Raised
from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta


def raised(records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Raised:
    """Return an adapter of a method that can hold these records, which are given by module path.

    ``targets``: names that match exactly those paths. Raises CompositionError if no single method can hold all of the
    records.
    """
    ways = (method.raised(records, targets) for method in concrete(LinearMethod).values())
    found = next((way for way in ways if way is not None), None)
    if found is None:
        raise CompositionError(
            "some layers have only adapters that rescale (IA3), others only low-rank ones, and no method writes "
            "both into one adapter. Combine adapters of one method"
        )
    return found
