"""Frozen weight in blocks of codes, as a file holds it: some rows at a time are decoded, multiplied and dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from veneer.ops.matmul import matmul, operand
from veneer.quant.product import CodedWeight

TILE_VALUES = 1 << 18
"""Values that are decoded at a time: in float32 they stay in a core's second-level cache."""


class BlockWeight(CodedWeight):
    """Frozen weight ``W (o, i)`` whose rows can be decoded one by one. A format gives ``shape`` and `rows`.

    ``dtype`` is that of ``dense()``. Tiles are rounded once, to the dtype of their product. A format's own kernel may
    leave the decoded values in float32.
    """

    __slots__ = ()
    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""

    @abstractmethod
    def rows(self, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k i"]:
        """Return the rows at an index, with the values of the format's own library, to the bit."""

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = self._transposed(flat) if transposed else self._product_of_rows(flat)
        return y.view(*x.shape[:-1], y.shape[1])

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        out: Tensor | None = None
        for rows, tile in self.tiles():
            out = tile.new_empty(self.shape, dtype=dtype or self.dtype) if out is None else out
            out[rows] = tile
        return torch.empty(self.shape, dtype=dtype or self.dtype) if out is None else out

    def tiles(self) -> Iterator[tuple[slice, Float32[Tensor, "k i"]]]:
        """Yield the decoded rows in order, with their places, about `TILE_VALUES` values at a time."""
        o, i = self.shape
        step = max(1, TILE_VALUES // max(1, i))
        for start in range(0, o, step):
            rows = slice(start, min(start + step, o))
            yield rows, self.rows(rows)

    def _product_of_rows(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        y, wide = x.new_empty(len(x), self.shape[0]), operand(x)
        for rows, tile in self.tiles():
            y[:, rows] = matmul(wide, tile.to(x.dtype).T, x.dtype)
        return y

    def _transposed(self, dy: Float[Tensor, "n o"]) -> Float[Tensor, "n i"]:
        """The sum over the tiles, in at least float32."""
        exact = torch.promote_types(dy.dtype, torch.float32)
        dx = dy.new_zeros(len(dy), self.shape[1], dtype=exact)
        for rows, tile in self.tiles():
            dx.addmm_(dy[:, rows].to(exact), tile.to(dy.dtype).to(exact))
        return dx.to(dy.dtype)
