"""Version of an adapter, as a program uses it: its change of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from veneer.model.program.bottleneck import Bottleneck
from veneer.ops.linear.layer import NOTHING
from veneer.ops.packed import PackedWeight
from veneer.ops.pairs import PackedPairs
from veneer.ops.terms import LayerTerms
from veneer.records.deltas import LinearDelta, PrefixDelta, PromptDelta, ResidualDelta

TokenRows = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Effects:
    """An adapter's records by path, its record ``table`` for the embeddings, and its replacements of base parameters.

    ``whole`` are parameters by path and name, W (o, i) if they are a layer's weight. ``rows`` are the index (n,) and
    values (n, width) of single rows of the embeddings and the head. ``front``: a prefix's records, or a prompt's.
    """

    linear: dict[str, LinearDelta] = field(default_factory=dict)
    table: LinearDelta | None = None
    residual: dict[str, ResidualDelta] = field(default_factory=dict)
    whole: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    front: tuple[PrefixDelta, ...] | PromptDelta | None = None

    def replaces(self, path: str) -> bool:
        """Return True if a parameter of the module at a path is replaced, or some of its rows."""
        return path in self.rows or any(path == place for place, _ in self.whole)


@dataclass(frozen=True, slots=True)
class OwnChanges:
    """One version's changes of a group of layers: a record for each layer, and ``whole`` weights that replace some
    layers' weights, by index.

    ``pairs`` are the low-rank parts of all layers packed together. If a layer maps its input, ``apart`` holds a packed
    low-rank part for each layer instead. ``terms`` are each layer's other packed changes; empty if there are none.
    Packed parts are removed from the records.
    """

    records: tuple[LinearDelta, ...]
    whole: Mapping[int, Tensor | PackedWeight]
    pairs: PackedPairs | None = None
    apart: tuple[PackedPairs | None, ...] = ()
    terms: tuple[LayerTerms | None, ...] = ()

    @property
    def only_adds(self) -> bool:
        """Return True if the changes only add low-rank parts to the layers' outputs."""
        return not (self.whole or self.apart or self.terms) and all(record is NOTHING for record in self.records)

    @property
    def scales(self) -> bool:
        """Return True if the pairs scale the layers' outputs too (`PackedPairs.scaling`)."""
        return self.pairs is not None and self.pairs.scales_y


class Owns(Protocol):
    """Changes that one adapter version makes to the layers of a program, by the number of their group."""

    def own(self, group: int) -> OwnChanges | None:
        """Return the changes of the group with this number, or None if there are none."""


class Version(Protocol):
    """Adapter version as operations use it: its ``effects``, the packed changes of linear layers, and the packed
    bottlenecks by the sub-layer that they follow.
    """

    @property
    def effects(self) -> Effects: ...

    @property
    def linears(self) -> Owns: ...

    @property
    def bottlenecks(self) -> Mapping[str, Bottleneck]: ...


Versions = Mapping[str, Version]
