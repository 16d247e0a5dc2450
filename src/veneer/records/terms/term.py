"""Interface of every term of a record: its tensors, and a copy with other tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

from torch import Tensor

from veneer.records.terms.form import Form

RowsProduct = Callable[..., Tensor]
"""Product of rows (*batch, i) with a weight (o, i), and a bias if there is one, as `torch.nn.functional.linear`."""


@dataclass(frozen=True, slots=True)
class Term:
    """Part of a record: a frozen dataclass. Gradients flow to the fields that are tensors.

    A method's ``lower`` computes small tensors (blocks, factors) under autograd and puts them into a term. Large
    tensors (all o·i values of a change) are computed inside of the term's products, and again in the backward pass.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the term, in the order of its fields."""
        values = (getattr(self, name) for name in field_names(cast(Hashable, type(self))))
        return tuple(value for value in values if isinstance(value, Tensor))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """Return the term with these in place of its `tensors`."""
        held = [name for name in field_names(cast(Hashable, type(self))) if isinstance(getattr(self, name), Tensor)]
        return cast(Self, replace(cast(Any, self), **dict(zip(held, tensors, strict=True))))

    def form(self) -> Form | None:
        """Return the term in a layout that kernels support; None if there is none."""
        return None

    @property
    def takes_dropout(self) -> bool:
        """Return True if the method's dropout acts on the input of the term."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_trained(self) -> bool:
        """Return True if any of the tensors requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)


@functools.cache
def field_names(kind: Hashable) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(field.name for field in fields(cast(Any, kind)))
