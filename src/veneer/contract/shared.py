"""Tensors that all layers of an adapter share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Tensors that follow from the config and are never trained; a file that holds them is checked against ``draw``.

    ``draw`` returns the tensors of these ``names``, on the CPU. ``source`` names their origin in messages.
    ``is_saved``: whether they are written.
    """

    names: tuple[str, ...]
    draw: Callable[[], dict[str, Tensor]]
    source: str
    is_saved: bool = True
