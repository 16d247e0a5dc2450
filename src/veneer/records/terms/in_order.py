"""Composition of the feature maps of several adapters on one layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.rotation import Rotation
from veneer.records.terms.scale import Scale


@dataclass(frozen=True, slots=True)
class InOrder(Rotation):
    """Composition of several maps, applied in order."""

    maps: tuple[Scale | Rotation, ...]

    @property
    def width(self) -> int:
        return self.maps[0].width

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for each in self.maps for tensor in each.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        rest = iter(tensors)
        return replace(self, maps=tuple(each.with_tensors([next(rest) for _ in each.tensors]) for each in self.maps))

    def apply(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        for each in self.maps:
            x = each.apply(x)
        return x

    def transposed(self) -> InOrder:
        return InOrder(tuple(each.transposed() for each in reversed(self.maps)))


def in_order(maps: Sequence[Scale | Rotation]) -> Scale | Rotation | None:
    """Return one map that applies all of them in order; None if there is none.

    If all are scales, the result is their product.
    """
    scales = [each for each in maps if isinstance(each, Scale)]
    if len(maps) < 2:
        return maps[0] if maps else None
    if len(scales) < len(maps):
        return InOrder(tuple(maps))
    return functools.reduce(lambda first, then: then.after(first), scales)
