"""Change ``W ⊙ (B A)``: the frozen weight multiplied entrywise by a matrix of low rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.base import Base
from veneer.records.terms.change import Change
from veneer.records.terms.form import Form
from veneer.records.terms.term import RowsProduct


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard(Change):
    """Change ``W ⊙ (B A)`` with W the frozen weight."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    base: Base

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.base.weight.dense(dtype)

    def form(self) -> Form:
        return Form("hadamard", (*self.shape, len(self.a)), self.a, self.b, base=self.base)

    def weighed(self, weight: float) -> Hadamard:
        return replace(self, b=self.b * weight)

    def look_up(
        self, index: Tensor, padding_idx: int | None = None, linear: RowsProduct = torch.nn.functional.linear
    ) -> Tensor:
        columns = torch.nn.functional.embedding(index, self.a.T, padding_idx)
        rows = torch.nn.functional.embedding(index, self.base.weight.dense().T)
        return linear(columns, self.b) * rows.to(self.dtype)
