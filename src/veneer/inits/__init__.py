"""Starts of trained parameters. The starts of low-rank factors are one file each, found by name.

Such a file offers ``find(name)``: the `Start` that a value of ``init_lora_weights`` means, or None if it is not its
own, and ``NAMES`` for messages.
A start that is not the base model (PiSSA, OLoRA) says so with ``taken_off``: the product that it starts from is then
taken off again in the record. The frozen weight itself is never changed, so nothing has to be put back, adapters on
the same base do not disturb each other, and any storage format of the base will do.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.sites import LinearSite
from veneer.errors import ConfigError

Factors = tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]


@dataclass(frozen=True)
class Start:
    """``factors(site, r, scale, generator)`` gives A (r, i) and B (o, r) in float32 on the CPU."""

    factors: Callable[[LinearSite, int, float, torch.Generator | None], Factors]
    taken_off: bool = False


def find_start(name: bool | str) -> Start | None:
    """Return the start that a value of ``init_lora_weights`` means; None if there is none of that name."""
    found: Iterator[Start | None] = (module.find(name) for module in _modules())
    return next((start for start in found if start is not None), None)


def start_names() -> list[str]:
    """Return the values that ``init_lora_weights`` may have, for messages."""
    return [name for module in _modules() for name in module.NAMES]


def dense_weight(site: LinearSite, r: int, who: str) -> Float[Tensor, "o i"]:
    """Return the frozen weight in float32. Raises ConfigError if it is not loaded or has no r directions to
    start from.
    """
    if site.experts > 1:
        raise ConfigError(
            f"{who} at {site.name} starts from one matrix; these are {site.experts} experts' in one tensor: "
            "leave init_lora_weights at True"
        )
    if site.weight is None:
        raise ConfigError(f"{who} at {site.name} starts from the frozen weight: load the base model before attaching")
    if r > min(site.weight.shape):
        raise ConfigError(f"{who} at {site.name}: r={r} is more than the weight of shape {site.weight.shape} can give")
    return site.weight.dense(torch.float32)


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    names = [info.name for info in pkgutil.iter_modules(__path__, prefix=f"{__name__}.")]
    return tuple(module for module in map(importlib.import_module, names) if hasattr(module, "find"))
