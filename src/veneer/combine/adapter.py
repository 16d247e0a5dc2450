"""A whole adapter from one record for each layer: the config of a method that can be them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.contract import LinearMethod
from veneer.core.records import LinearDelta
from veneer.errors import CompositionError
from veneer.methods import all_methods


def config_of(records: Mapping[str, LinearDelta], targets: Sequence[str]) -> LinearMethod:
    """A config under which the records, by module path, are what its method lowers to.

    ``targets``: names that match exactly those paths. Raises CompositionError where no one method can be all of them.
    """
    for method in all_methods().values():
        config = method.of_records(records, targets) if issubclass(method, LinearMethod) else None
        if config is not None:
            return config
    raise CompositionError(
        "on some layers only adapters that rescale act (IA3), on others low-rank ones: no one method is both"
    )
