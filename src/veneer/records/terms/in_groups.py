"""Change of a grouped convolution, whose weight matrix is block-diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.channel_groups import block_diagonal
from veneer.records.terms.change import Change
from veneer.records.terms.pair import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class InGroups(Change):
    """Change of the kernel of a grouped convolution. ``of`` is the change of its stacked blocks (o, i / groups).

    As a matrix (o, i) it is zero outside the blocks.
    """

    of: Pair | Change
    groups: int

    @property
    def shape(self) -> tuple[int, int]:
        o, k = (len(self.of.b), self.of.a.shape[-1]) if isinstance(self.of, Pair) else self.of.shape
        return o, k * self.groups

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.of.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        return replace(self, of=self.of.with_tensors(tensors))

    def blocks(self, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """Return the stacked blocks (o, i / groups) of the change, in ``dtype``."""
        return self.of.dense(dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return block_diagonal(self.blocks(dtype or self.dtype), self.groups)

    def weighed(self, weight: float) -> InGroups:
        return replace(self, of=self.of.weighed(weight))


def in_groups(of: Pair | Change, groups: int) -> Pair | Change:
    """Return a change of stacked blocks as a change of the weight; unchanged if there is one group."""
    return of if groups == 1 else InGroups(of=of, groups=groups)
