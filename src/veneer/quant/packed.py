"""Frozen weights in the layout of the serving kernels: dense ones and quantized ones, both without a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.experts import PackedStack
from veneer.ops.packed import ROWS, PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.product import recorded_product


@dataclass(frozen=True, slots=True)
class PackedDense:
    """``W (o, i)`` in bfloat16, float16 or float32, packed in panels of rows.

    Products accumulate in float32. Transposed products, for gradients, unpack the weight.
    """

    packed: PackedWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return recorded_product(x.to(self.packed.dtype), self._multiply, False)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return recorded_product(dy.to(self.packed.dtype), self._multiply, True)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        weight = self.packed.dense()
        return weight if dtype is None else weight.to(dtype)

    def _multiply(self, x: Tensor, transposed: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if transposed or x.dtype not in ROWS:
            weight = self.packed.dense()
            y = torch.nn.functional.linear(rows, weight.T if transposed else weight)
        else:
            y = self.packed.matmul(rows if rows.stride(-1) == 1 else rows.contiguous())
        return y.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """``W (experts, o, i)`` of the experts of a layer, packed in panels."""

    packed: PackedStack

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def expert(self, number: int) -> PackedDense | PackedCoded:
        packed = self.packed.expert(number)
        return PackedDense(packed) if isinstance(packed, PackedWeight) else PackedCoded(packed)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "experts o i"]:
        return torch.stack([self.expert(number).dense(dtype) for number in range(self.shape[0])])


@dataclass(frozen=True, slots=True)
class PackedCoded:
    """``W (o, i)`` in packed quantized codes.

    Products are computed in the dtype to which decoded values are rounded, and returned in the input's dtype.
    Transposed products, for gradients, dequantize the weight.
    """

    packed: PackedCodes

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return recorded_product(x.to(self.packed.dtype), self._multiply, False).to(x.dtype)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return recorded_product(dy.to(self.packed.dtype), self._multiply, True).to(dy.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return self.packed.dense(dtype)

    def _multiply(self, x: Tensor, transposed: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if transposed:
            y = rows @ self.packed.dense()
        else:
            y = self.packed.matmul(rows if rows.stride(-1) == 1 else rows.contiguous())
        return y.reshape(*x.shape[:-1], -1)
