"""Row-wise int8 in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

# 1/127 in float32, as bitsandbytes multiplies rather than divides.
INVERSE_127 = 7.874015718698502e-3


def quantize_int8(w: Float[Tensor, "o i"]) -> tuple[Int8[Tensor, "o i"], Float32[Tensor, " o"]]:
    absmax = w.abs().amax(dim=1).float() if w.shape[1] else w.new_zeros(len(w), dtype=torch.float32)
    inverse = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    return torch.round(w * inverse[:, None]).to(torch.int8), absmax


def dequantize_int8(
    codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"], dtype: torch.dtype
) -> Float[Tensor, "o i"]:
    return (codes * absmax[:, None] * INVERSE_127).to(dtype)


def matmul_int8(
    x: Float[Tensor, "rows i"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows o"]:
    return x @ dequantize_int8(codes, absmax, x.dtype).T


def matmul_t_int8(
    dy: Float[Tensor, "rows o"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows i"]:
    return dy @ dequantize_int8(codes, absmax, dy.dtype)
