"""Frozen weight in 8 bits with one scale per row.

Source: Dettmers, Lewis, Belkada, Zettlemoyer 2022, LLM.int8(), arXiv:2208.07339, section 2. Difference: activations are
not quantized, so there are no outliers to separate, and the only error is the weight's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from veneer.errors import FormatError
from veneer.ops.int8 import dequantize_int8, matmul_int8, matmul_t_int8, quantize_int8
from veneer.quant.product import CodedWeight
from veneer.quant.spec import Parts, part_problems

NAME = "int8"
# Rows are independent: quantizing some at a time bounds the float32 copies that it takes.
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class Int8Weight(CodedWeight):
    """``W (o, i) = codes * absmax / 127``. If ``compute_dtype`` is None, products are computed in the dtype of the
    input.
    """

    codes: Int8[Tensor, "o i"]
    absmax: Float32[Tensor, " o"]
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.absmax.numel() * self.absmax.element_size()

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        if x.dtype == torch.float64:  # exact arithmetic for checks; the kernels stop at float32
            dense = self.dense(torch.float64)
            return x @ (dense if transposed else dense.T)
        run = matmul_t_int8 if transposed else matmul_int8
        return run(x, self.codes, self.absmax)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        if dtype == torch.float64:
            return dequantize_int8(self.codes, self.absmax).to(dtype)
        return dequantize_int8(self.codes, self.absmax, dtype=dtype or self.dtype)


@dataclass(frozen=True, slots=True)
class Int8Spec:
    """Specification of a matrix in int8."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (torch.int8, self.shape), "SCB": (torch.float32, self.shape[:1])}

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        step = max(1, CHUNK_VALUES // max(1, self.shape[1]))
        codes = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(self.shape[0], dtype=torch.float32, device=weight.device)
        for row in range(0, self.shape[0], step):
            codes[row : row + step], absmax[row : row + step] = quantize_int8(weight[row : row + step])
        return {"weight": codes, "SCB": absmax}

    def bind(self, parts: Parts) -> Int8Weight:
        return Int8Weight(parts["weight"], parts["SCB"], self.dtype, self.compute_dtype)

    def owns(self, key: str) -> bool:
        return key in ("weight", "SCB", "weight_format")

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        # weight_format 0: rows one after the other
        return {"weight": parts["weight"], "SCB": parts["SCB"], "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def from_disk(self, tensors: Parts) -> tuple[Int8Spec, dict[str, Tensor]]:
        problems = part_problems(tensors, self.part_layout())
        order = tensors.get("weight_format")
        if order is not None and order.tolist() not in (0, [0]):
            problems.append(f"weight_format is {order.tolist()}: only 0 (rows one after the other) can be read")
        if problems:
            raise FormatError(
                f"an int8 weight of shape {self.shape} cannot be read: {'; '.join(problems)}. Save or download the "
                "checkpoint again"
            )
        return self, {name: tensors[name].contiguous() for name in self.part_layout()}


def quantize(weight: Float[Tensor, "o i"], *, compute_dtype: torch.dtype | None = None) -> Int8Weight:
    """Return a weight in int8. Raises ShapeError, NonFiniteError."""
    spec = Int8Spec((weight.shape[0], weight.shape[1]), weight.dtype, compute_dtype)
    return spec.bind(spec.quantize(weight))
