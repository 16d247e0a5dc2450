"""The record of an adapter at a layer, kept with the adapter's tensors while it is those tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from veneer.contract import LinearMethod
from veneer.core.records import LinearDelta
from veneer.ops.linear.layer import FIELDS

_PLACE = "_lowered"


@dataclass(frozen=True, slots=True)
class _Lowered:
    """A record, and by its fields the names of the holder's parameters that it consists of."""

    config: LinearMethod
    record: LinearDelta
    names: dict[str, str]

    def is_of(self, holder: nn.Module) -> bool:
        """Return True if the holder's parameters are still those of the record."""
        return all(holder._parameters.get(name) is getattr(self.record, field) for field, name in self.names.items())


def lowered(holder: nn.Module, config: LinearMethod, lower: Callable[[], LinearDelta]) -> LinearDelta:
    """The record that ``lower`` makes of a holder's tensors, kept while config and parameters are the same ones.

    Lowering plain LoRA takes longer than a small layer's products. A record that is computed from parameters (DoRA's
    scales) is computed each time.
    """
    kept = cast("_Lowered | None", vars(holder).get(_PLACE))
    if kept is not None and kept.config is config and kept.is_of(holder):
        return kept.record
    record = lower()
    names = _names(holder, record)
    if names is None:
        vars(holder).pop(_PLACE, None)
    else:
        vars(holder)[_PLACE] = _Lowered(config, record, names)
    return record


def _names(holder: nn.Module, record: LinearDelta) -> dict[str, str] | None:
    """The name of the parameter that each field is; None where one is computed."""
    own = {id(parameter): name for name, parameter in holder._parameters.items()}
    fields: dict[str, Tensor] = {f: value for f in FIELDS if (value := getattr(record, f)) is not None}
    return {f: own[id(t)] for f, t in fields.items()} if all(id(t) in own for t in fields.values()) else None
