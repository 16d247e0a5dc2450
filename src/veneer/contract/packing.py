"""Packings: the form in which a method is written to a file, either the trained one or one that other
libraries know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.contract.parameters import Params


@dataclass(frozen=True)
class Packing:
    """Form of an adapter on disk. Its config is that in training, except for ``fields``: config fields saved with other
    values.

    A subclass also converts the parameters of a layer, with the same effect. ``fixed`` names the parameters that are
    saved at their initial values and never trained. ``whole`` names the parameters among ``fixed`` that hold integers,
    such as indices, with their dtypes in the file and in memory.
    """

    fields: Mapping[str, object] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    whole: Mapping[str, torch.dtype] = field(default_factory=dict)

    def problems(self, site: Any, params: Params) -> list[str]:
        """Return the problems of parameters that were read from a file, other than wrong shapes and dtypes."""
        return []

    def pack(self, params: Params) -> dict[str, Tensor]:
        """Return a layer's parameters in the form on disk, with the names and shapes of the saved config."""
        return dict(params)

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        """Return the parameters in training from their form on disk. It reverses `pack` bit for bit, so that training
        can resume.
        """
        return dict(packed)
