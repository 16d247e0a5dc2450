"""Initialisation of trained parameters. Each initialisation of low-rank factors is one file, found by name.

Such a file offers ``find(name)``: the `Start` for a value of ``init_lora_weights``, or None for a value of another
file. It also offers ``NAMES`` for messages.
An initialisation that changes the function at the start (PiSSA, OLoRA) sets ``taken_off``: the record then subtracts
the initial product. The frozen weight itself never changes. Nothing has to be restored, adapters on the same base do
not disturb each other, and the base may have any storage format.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract.needed import missing_weight
from veneer.errors import ConfigError
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite

Factors = tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]


@dataclass(frozen=True)
class Start:
    """Initialisation of low-rank factors. ``factors(site, r, scale, generator)`` returns A (r, i) and B (o, r) in
    float32 on the CPU.

    ``taken_off``: the adapter subtracts the product of the initial factors, so that the layer starts unchanged.
    ``keeps_b``: B is not trained.
    """

    factors: Callable[[LinearSite, int, float, torch.Generator | None], Factors]
    taken_off: bool = False
    keeps_b: bool = False


def find_start(name: bool | str) -> Start | None:
    """Return the initialisation for a value of ``init_lora_weights``, or None if the value is unknown."""
    found: Iterator[Start | None] = (module.find(name) for module in _modules())
    return next((start for start in found if start is not None), None)


def start_names() -> list[str]:
    """Return the allowed values of ``init_lora_weights``, for messages."""
    return [name for module in _modules() for name in module.NAMES]


def dense_weight(site: LinearSite, r: int, who: str) -> Float[Tensor, "o i"]:
    """Return the frozen weight in float32. Raises ConfigError if it is not loaded or has fewer than r directions."""
    problems = weight_problems(site, r, who)
    if problems:
        raise ConfigError("; ".join(problems))
    return cast(FrozenWeight, site.weight).dense(torch.float32)


def weight_problems(site: LinearSite, r: int, who: str) -> list[str]:
    """Return a message, alone in a list, if the frozen weight is not one matrix, is not loaded, or has fewer than r
    rows or columns.
    """
    if site.experts > 1:
        return [
            f"{who} at {site.name} starts from a single matrix, but this weight is a stack of {site.experts} experts' "
            "matrices: leave init_lora_weights at True"
        ]
    if site.weight is None:
        return [missing_weight(site, who)]
    if r > min(site.weight.shape):
        return [f"{who} at {site.name}: r={r} must be at most {min(site.weight.shape)}, the smaller side of the weight"]
    return []


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    names = [info.name for info in pkgutil.iter_modules(__path__, prefix=f"{__name__}.")]
    return tuple(module for module in map(importlib.import_module, names) if hasattr(module, "find"))
