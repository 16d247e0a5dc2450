"""Change of the weight other than a low-rank pair: an object with products, like a frozen weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.form import Form
from veneer.records.terms.term import RowsProduct, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(Term, ABC):
    """Change ΔW (o, i), added to the weight.

    A subclass declares its tensors as fields and gives `shape` and `dense`, which computes ΔW from them under
    autograd. Without a ``matmul`` of its own, ΔW is materialized for each product, and again in the backward pass, so
    that no layer keeps o·i values. With one, ΔW is materialized only for products with many rows (`is_made_for`).
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        """Return ΔW in ``dtype``, differentiable in the tensors; in their own dtype if it is None."""

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return ``ΔW x`` on the last axis."""
        return torch.nn.functional.linear(x, self.dense(x.dtype))

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        """Return ``ΔWᵀ dy`` on the last axis."""
        return torch.nn.functional.linear(dy, self.dense(dy.dtype).T)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products: the dtype of the first floating-point tensor."""
        return next(tensor.dtype for tensor in self.tensors if tensor.is_floating_point())

    def apply(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return ``ΔW x``, in the change's dtype."""
        return self.matmul(x.to(self.dtype))

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        """Return True if a product with ``n_rows`` rows uses the matrix of `dense`, not ``matmul``.

        ``dtype``: dtype of the matrix product. If the rows are at least as many as the smaller of o and i, a dense
        product is faster than transforming each row. A change without a ``matmul`` of its own always takes the matrix.
        """
        return type(self).matmul is Change.matmul or n_rows >= min(self.shape)

    def rounded(self, dtype: torch.dtype) -> Change:
        """Return the change with floating-point tensors in ``dtype``; unchanged if it computes in float32 anyway."""
        narrow = self.with_tensors([x.to(dtype) if x.is_floating_point() else x for x in self.tensors])
        return narrow if narrow.dtype == dtype else self  # a transform stays in float32

    def on(self, rows: slice, n_before: int) -> Change:
        """Return the change as it acts on the tokens ``rows`` of a pass: itself, unless the change differs between
        tokens.

        ``n_before``: number of tokens before ``rows`` on which this change acts.
        """
        return self

    def look_up(
        self, index: Tensor, padding_idx: int | None = None, linear: RowsProduct = torch.nn.functional.linear
    ) -> Float[Tensor, "*batch o"]:
        """Return the columns of the change at token ids. The column at ``padding_idx`` gets no gradient.

        ``linear`` computes products with the factors of the change, if it has any.
        """
        return torch.nn.functional.embedding(index, self.dense().T, padding_idx)

    def weighed(self, weight: float) -> Change:
        """Return the change times a number."""
        return Weighed(of=self, weight=weight)

    def with_rows_times(self, factors: Float[Tensor, " o"]) -> Change:
        """Return the change with each row of the matrix multiplied by a number."""
        return RowsTimes(of=self, factors=factors)

    def transposed(self) -> Change:
        """Return the change of the transposed weight (i, o)."""
        return Transposed(of=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Derived(Change, ABC):
    """Change that is computed from another one (``of``), and has that change's tensors."""

    of: Change

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def takes_dropout(self) -> bool:
        return self.of.takes_dropout

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.of.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        return replace(self, of=self.of.with_tensors(tensors))

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        return self.of.is_made_for(n_rows, dtype)

    def rounded(self, dtype: torch.dtype) -> Self:
        return replace(self, of=self.of.rounded(dtype))

    def on(self, rows: slice, n_before: int) -> Self:
        return replace(self, of=self.of.on(rows, n_before))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed(_Derived):
    """Change ``of`` times a number."""

    weight: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.of.shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.of.dense(dtype) * self.weight

    def matmul(self, x: Tensor) -> Tensor:
        return self.of.matmul(x) * self.weight

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.of.matmul_t(dy) * self.weight

    def form(self) -> Form | None:
        form = self.of.form()
        return None if form is None else form.weighed(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTimes(_Derived):
    """Change ``diag(factors) of``. The factors are constants."""

    factors: Float[Tensor, " o"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.of.shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        matrix = self.of.dense(dtype)
        return matrix * self.factors.to(matrix.dtype)[:, None]

    def matmul(self, x: Tensor) -> Tensor:
        y = self.of.matmul(x)
        return y * self.factors.to(y.dtype)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.of.matmul_t(dy * self.factors.to(dy.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed(_Derived):
    """Transpose (i, o) of the change ``of``, for a layer whose weight is transposed."""

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.of.shape
        return i, o

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.of.dense(dtype).T

    def matmul(self, x: Tensor) -> Tensor:
        return self.of.matmul_t(x)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.of.matmul(dy)
