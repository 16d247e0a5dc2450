"""Packings: the form in which a method is written to a file, either the trained one or one that other
libraries know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from veneer.contract.parameters import Params


@dataclass(frozen=True)
class Packing:
    """Form on disk that equals the trained one except for ``fields``: config fields that are written with other values.

    A subclass changes the parameters of a layer too, with the same effect. It names those that are ``fixed``: kept with
    the adapter at their initial values, never trained.
    """

    fields: Mapping[str, object] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def pack(self, params: Params) -> dict[str, Tensor]:
        """Return a layer's parameters with the names and shapes of the written config."""
        return dict(params)

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        """Return the inverse of `pack`, bit for bit, so that training can resume."""
        return dict(packed)
