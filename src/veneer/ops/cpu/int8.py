"""Row-wise int8 by csrc/int8."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.matmul import matmul
from veneer.ops.memory import address


def quantize_int8(w: Float[Tensor, "o i"]) -> tuple[Int8[Tensor, "o i"], Float32[Tensor, " o"]]:
    o, i = w.shape
    codes = torch.empty(o, i, dtype=torch.int8)
    absmax = torch.empty(o, dtype=torch.float32)
    kernels().int8_quantize(address(w), DTYPES[w.dtype], o, i, address(codes), address(absmax))
    return codes, absmax


def dequantize_int8(
    codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"], dtype: torch.dtype
) -> Float[Tensor, "o i"]:
    out = torch.empty(codes.shape, dtype=dtype)
    kernels().int8_dequantize(address(codes), address(absmax), *codes.shape, DTYPES[dtype], address(out))
    return out


def matmul_int8(
    x: Float[Tensor, "rows i"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows o"]:
    return matmul(x, dequantize_int8(codes, absmax, x.dtype).T, x.dtype)


def matmul_t_int8(
    dy: Float[Tensor, "rows o"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows i"]:
    return matmul(dy, dequantize_int8(codes, absmax, dy.dtype), dy.dtype)
