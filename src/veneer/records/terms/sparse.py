"""Sparse change of the weight: values at some of its entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.records.terms.change import Change
from veneer.records.terms.form import Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse(Change):
    """Change S (o, i): ``values`` at the flat indices ``places`` (row-major, without duplicates), zero elsewhere."""

    values: Float[Tensor, " n"]
    places: Int[Tensor, " n"]
    size: tuple[int, int]

    @property
    def takes_dropout(self) -> bool:
        """Return False: as in PEFT, dropout acts only on the input of a low-rank pair in the same record."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values if dtype is None else self.values.to(dtype)
        o, i = self.size
        return values.new_zeros(o * i).index_put_((self.places,), values).view(o, i)

    def form(self) -> Form:
        return Form("sparse", self.size, self.values, places=self.places)


def place_problems(name: str, places: Int[Tensor, " n"], size: tuple[int, int], what: str) -> list[str]:
    """Return the problems of flat indices read from a file: they must lie in a weight of this size, without duplicates.

    ``name``: the layer's name in messages. ``what``: the tensor's name.
    """
    o, i = size
    if int(places.min()) < 0 or int(places.max()) >= o * i:
        return [f"{what} of {name} lie outside its {o} x {i} weights"]
    if bool((places.sort().values.diff() == 0).any()):
        return [f"{what} of {name} name a weight twice: each may be listed once"]
    return []
