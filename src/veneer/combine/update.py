"""Update of an adapter at one layer: a record with the weight that it changes, as a dense matrix if needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import fold_linear


@dataclass(frozen=True, slots=True)
class Update:
    """Change of one layer by an adapter: its record, and the layer's ``weight`` if the record scales or rotates it
    (DoRA, OFT).
    """

    record: LinearDelta
    weight: FrozenWeight | None = None

    @property
    def is_lowrank(self) -> bool:
        """Return True if the update is exactly ``scale B A``, so that it can be added as factors without a loss."""
        return self.record.only_adds and not self.record.changes

    def dense(self) -> Float[Tensor, "o i"]:
        """Return ``W' - W`` in at least float32.

        Raises CompositionError for a record that scales or rotates a missing weight.
        """
        if self.record.only_adds:
            return self.record.added()
        if self.weight is None:
            raise CompositionError(
                "an adapter scales or rotates the weight itself (DoRA, IA3, OFT), so its update depends on the base "
                "model: give the base too (--base MODEL)"
            )
        base = self.weight.dense(torch.float32)
        return fold_linear(self.record, base)[0] - base


def concatenated(updates: Sequence[Update], weights: Sequence[float]) -> LinearDelta:
    """Return ``Σ w_i s_i B_i A_i`` exactly, as factors concatenated along the rank. Each update must be low-rank."""
    each = zip(updates, weights, strict=True)
    pairs = (u.record.low_rank.weighed(float(w)).plain for u, w in each if u.record.low_rank is not None)
    return LinearDelta.pair(*LinearDelta(adds=tuple(pairs)).factors())
