"""Weights that are sharded over processes (`model.sharded.sharding`), read before their block gathers them.

Each read gathers one weight. All processes that share it read it together, since they attach the same adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class CutWeight:
    """Sharded frozen weight, which is gathered again at every read."""

    shape: tuple[int, int]
    nbytes: int
    gather: Callable[[], FrozenWeight]

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return self.gather().matmul(x)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return self.gather().matmul_t(dy)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return self.gather().dense(dtype)


def is_part(tensor: Tensor | None) -> bool:
    """Return True if a tensor is one process's shard."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module one process never imports


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_part(tensor) else tensor


def read_whole(weight: FrozenWeight, stored: Tensor | None, gather: Callable[[], FrozenWeight]) -> FrozenWeight:
    """Return a module's weight. If ``stored`` is a shard, return one that calls ``gather`` at each read."""
    return CutWeight(weight.shape, weight.nbytes, gather) if is_part(stored) else weight
