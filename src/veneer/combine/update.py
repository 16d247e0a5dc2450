"""The update of an adapter at one layer: a record with the weight that it changes, as a matrix where needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.frozen import FrozenWeight
from veneer.core.linear import fold_linear, plain
from veneer.core.records import LinearDelta
from veneer.errors import CompositionError


@dataclass(frozen=True, slots=True)
class Update:
    """One adapter's record at one layer, brought to a plain pair.

    ``weight`` is needed only by records that scale it (DoRA, IA3).
    """

    record: LinearDelta
    weight: FrozenWeight | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", plain(self.record))

    @property
    def is_lowrank(self) -> bool:
        """True where the update is ``scale B A`` and nothing else, so that it can be added exactly as factors."""
        return self.record.in_scale is None and self.record.out_scale is None

    def dense(self) -> Float[Tensor, "o i"]:
        """``W' - W`` in at least float32.

        Raises CompositionError for a record that scales a weight which is not there.
        """
        if self.is_lowrank:
            if self.record.a is None or self.record.b is None:
                raise CompositionError("the record changes no weight, only a bias: there is nothing to combine")
            wide = torch.promote_types(self.record.a.dtype, torch.float32)
            return (self.record.b.to(wide) @ self.record.a.to(wide)) * self.record.scale
        if self.weight is None:
            raise CompositionError(
                "an adapter scales the weight itself (DoRA, IA3), so its update depends on the base model: "
                "give the base too (--base MODEL)"
            )
        base = self.weight.dense(torch.float32)
        return fold_linear(self.record, base)[0] - base


def concatenated(updates: Sequence[Update], weights: Sequence[float]) -> LinearDelta:
    """``Σ w_i s_i B_i A_i`` exactly, as factors concatenated along the rank. Each update must be low-rank."""
    factors = [
        (u.record.a, u.record.b * (w * u.record.scale))
        for u, w in zip(updates, weights, strict=True)
        if u.record.a is not None and u.record.b is not None
    ]
    return LinearDelta(a=torch.cat([a for a, _ in factors]), b=torch.cat([b for _, b in factors], dim=1))
