"""Frozen weight in blocks of codes, as a file holds it. Products decode a few rows at a time and then drop them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from veneer.ops.matmul import add_matmul, matmul, operand
from veneer.ops.scaled import ScaledCodes, decode_scaled, has_product, matmul_scaled
from veneer.quant.product import CodedWeight

TILE_VALUES = 1 << 20
"""Values that are decoded at a time: 4 MB in float32. With a quarter of them 1024 rows took 1.3x the time."""
GPU_TILE_VALUES = 1 << 26
"""On a GPU, where each tile costs several launches: 256 MB in float32, the largest matrix of a block of an 8B model."""
FEW_ROWS = 16
"""Rows of x that a kernel multiplies while it decodes; for more, tiles are decoded once for all of them."""


class BlockWeight(CodedWeight):
    """Base of frozen weights ``W (o, i)`` whose rows can be decoded one by one. A format defines ``shape`` and `rows`.

    ``dtype`` is that of ``dense()``. Values are rounded to the dtype in which their product is computed, which may be
    float32 for narrower rows.
    """

    __slots__ = ()
    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""

    @property
    def is_narrow(self) -> bool:
        """Return True if values take fewer than 16 bits."""
        return True

    @abstractmethod
    def rows(self, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k i"]:
        """Return the decoded rows at an index, bit-equal to those of the format's own library."""

    def few_rows(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"] | None:
        """Return ``x Wᵀ`` for at most `FEW_ROWS` rows by the format's own kernel, or None if it has none for this x."""
        return None

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = self.few_rows(flat) if not transposed and len(flat) <= FEW_ROWS else None
        if y is None:
            y = self._transposed(flat) if transposed else self._product_of_rows(flat)
        return y.view(*x.shape[:-1], y.shape[1])

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        out: Tensor | None = None
        for rows, tile in self.tiles():
            out = tile.new_empty(self.shape, dtype=dtype or self.dtype) if out is None else out
            out[rows] = tile
        return torch.empty(self.shape, dtype=dtype or self.dtype) if out is None else out

    def tiles(self, n_values: int | None = None) -> Iterator[tuple[slice, Float32[Tensor, "k i"]]]:
        """Yield slices of rows in order, each with its decoded rows.

        A slice has about ``n_values`` values, or `TILE_VALUES` if it is None.
        """
        o, i = self.shape
        step = max(1, (n_values or TILE_VALUES) // max(1, i))
        for start in range(0, o, step):
            rows = slice(start, min(start + step, o))
            yield rows, self.rows(rows)

    def _product_of_rows(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        y, wide = x.new_empty(len(x), self.shape[0]), operand(x)
        for rows, tile in self.tiles(tile_values(x.device)):
            matmul(wide, tile.to(wide.dtype).T, x.dtype, out=y[:, rows])
        return y

    def _transposed(self, dy: Float[Tensor, "n o"]) -> Float[Tensor, "n i"]:
        """Return ``dy W``, summed over tiles of rows in at least float32. Each tile's product is rounded as a dense
        weight's is.
        """
        wide, exact = operand(dy), torch.promote_types(dy.dtype, torch.float32)
        dx = dy.new_zeros(len(dy), self.shape[1], dtype=exact)
        for rows, tile in self.tiles(tile_values(dy.device)):
            add_matmul(dx, wide[:, rows], tile.to(wide.dtype))
        return dx.to(dy.dtype)


def tile_values(device: torch.device) -> int:
    """Return how many values of a weight are decoded at a time for a product on a device."""
    return GPU_TILE_VALUES if device.type == "cuda" else TILE_VALUES


class ScaledWeight(BlockWeight):
    """Base of frozen weights stored as integers or small floats with scales. A format defines ``shape``
    and `scaled`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def scaled(self) -> ScaledCodes:
        """Codes and scales in the form that the kernels take."""

    def rows(self, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k i"]:
        return decode_scaled(self.scaled, index)

    def few_rows(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"] | None:
        return matmul_scaled(x, self.scaled) if has_product(x) else None
