"""Tensors that all layers of an adapter share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Tensors of these ``names`` that all layers share.

    They follow from the config and are never trained: ``draw`` returns them, on the CPU, and a file that holds them is
    checked against the result. ``source`` names their origin in messages. ``is_saved``: they are written to the file.
    ``is_repeated``: PEFT's files hold them again at each layer.

    If ``is_held``, they are parameters instead, trained or fixed: each layer has them in its ``shapes``, ``init`` and
    ``lower``. If layers give a shared tensor the same name on disk, they all hold the first layer's tensor. It has one
    gradient, one optimizer state and one entry in the file.

    ``group`` is for a parameter that only the layers of a group share. It returns the group of a layer, given the
    layer's path and the parameter's name. Each layer then has the parameter in the file under its own key.
    """

    names: tuple[str, ...]
    draw: Callable[[], dict[str, Tensor]] = dict
    source: str = ""
    is_saved: bool = True
    is_repeated: bool = False
    is_held: bool = False
    group: Callable[[str, str], str] | None = None
