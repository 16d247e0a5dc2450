"""Record of an adapter at a layer, kept with the adapter's tensors while it consists only of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn

from veneer.contract import LinearMethod
from veneer.records.deltas import LinearDelta

_PLACE = "_lowered"


@dataclass(frozen=True, slots=True)
class _Lowered:
    """A record, and for each of its tensors the name of the holder's parameter that it is."""

    config: LinearMethod
    record: LinearDelta
    names: tuple[str, ...]

    def is_of(self, holder: nn.Module) -> bool:
        """Return True if the holder's parameters are still the record's tensors."""
        own = zip(self.names, self.record.tensors, strict=True)
        return all(holder._parameters.get(name) is tensor for name, tensor in own)


def lowered(holder: nn.Module, config: LinearMethod, lower: Callable[[], LinearDelta]) -> LinearDelta:
    """Return the record of ``lower`` for a holder's tensors, kept while config and parameters are the same ones.

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


def _names(holder: nn.Module, record: LinearDelta) -> tuple[str, ...] | None:
    """Return the parameter's name for each tensor of a record; None if one of them is not a parameter."""
    own = {id(parameter): name for name, parameter in holder._parameters.items()}
    names = [own.get(id(tensor)) for tensor in record.tensors]
    return None if None in names else cast("tuple[str, ...]", tuple(names))
