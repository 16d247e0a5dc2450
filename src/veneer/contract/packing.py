"""Packings: the form in which a method is written to a file, as it is trained or as others know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from veneer.contract.parameters import Params


@dataclass(frozen=True)
class Packing:
    """As it is trained, but for ``fields``: those of the config that are written with other values.

    A subclass changes the parameters of a layer too, with the same effect, and names those that are ``fixed``: kept
    with the adapter as they started, never trained.
    """

    fields: Mapping[str, object] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def pack(self, params: Params) -> dict[str, Tensor]:
        """Return a layer's parameters as the written config names and shapes them."""
        return dict(params)

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        """Return the inverse of `pack`, bit for bit, so that training can go on."""
        return dict(packed)
