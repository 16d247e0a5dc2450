"""Frozen weight of a layer as a change of it reads it."""

from __future__ import annotations

import torch

from veneer.records.frozen import FrozenWeight


class Base:
    """Frozen weight of a layer as a record refers to it: not as a part, which would be counted, copied and packed."""

    def __init__(self, weight: FrozenWeight) -> None:
        self.weight = weight

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Base) and torch.equal(self.weight.dense(), other.weight.dense())

    __hash__ = None  # type: ignore[assignment]
