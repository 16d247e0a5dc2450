"""Cache of an adapter's record in one layer. A record is the adapter's change as tensors for the layer's kernel."""

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
    """A cached record. ``names`` has, for each of the record's tensors, the name of the adapter's parameter that is the
    same tensor.
    """

    config: LinearMethod
    record: LinearDelta
    names: tuple[str, ...]

    def is_of(self, holder: nn.Module) -> bool:
        """Return True if the tensors of the cached record are still the current parameters of the adapter's module
        ``holder``.
        """
        own = zip(self.names, self.record.tensors, strict=True)
        return all(holder._parameters.get(name) is tensor for name, tensor in own)


def lowered(holder: nn.Module, config: LinearMethod, lower: Callable[[], LinearDelta]) -> LinearDelta:
    """Return the record that ``lower`` computes, or the one cached in ``holder``.

    A cached record is valid while ``config`` and the parameters that it refers to are the same objects. It saves time
    because lowering plain LoRA takes longer than a small layer's products. A record that also holds computed values,
    such as DoRA's scales, is not cached.
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
    """Return, for each tensor of a record, its name as a parameter; or None if one of them is not a parameter."""
    own = {id(parameter): name for name, parameter in holder._parameters.items()}
    names = [own.get(id(tensor)) for tensor in record.tensors]
    return None if None in names else cast("tuple[str, ...]", tuple(names))
