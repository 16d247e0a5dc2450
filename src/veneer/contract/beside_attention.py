"""Contract of methods that add to the attention of a decoder's upper layers."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.contract.config import MethodConfig
from veneer.contract.keys import Place
from veneer.contract.parameters import Params, Shapes
from veneer.contract.places import Placed, ShapesByKey, damaged, module_places
from veneer.records.deltas import AttendedDelta
from veneer.records.sites import AttendingSite

_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.")
_SAMPLE = AttendingSite(name="", layer=0, features=1024)


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(MethodConfig):
    """Method that adds to attention, with its own parameters in each of the uppermost layers."""

    @property
    @abstractmethod
    def attention_name(self) -> str | None:
        """The last name of the attention modules, or None for the name that the model's family uses."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Number of layers with parameters, counted from the top."""

    @abstractmethod
    def shapes(self, site: AttendingSite) -> Shapes: ...

    @abstractmethod
    def init(self, site: AttendingSite, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    @abstractmethod
    def lower(self, site: AttendingSite, params: Params) -> AttendedDelta: ...

    @property
    def counts_layers(self) -> bool:
        return True

    @property
    def samples(self) -> tuple[AttendingSite, ...]:
        return (_SAMPLE,)

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        found = module_places(self, shapes, source, _named)
        if found is not None and len(found) != self.n_layers:
            raise damaged(source, f"it has {len(found)} layers, but its config says {self.n_layers}")
        return found


def _named(sample: AttendingSite, place: Place) -> AttendingSite | None:
    match = _LAYER.match(place.path)
    return None if match is None else replace(sample, name=place.path, layer=int(match.group(1)))
