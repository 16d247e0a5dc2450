"""Reference to the frozen weight that a change depends on."""

from __future__ import annotations

import torch

from veneer.records.frozen import FrozenWeight


class Base:
    """Reference to the frozen weight that a change is computed from.

    The weight is not counted, copied or packed with the change.
    """

    def __init__(self, weight: FrozenWeight) -> None:
        self.weight = weight

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Base) and torch.equal(self.weight.dense(), other.weight.dense())

    __hash__ = None  # type: ignore[assignment]
