"""Blockwise 8-bit codes by csrc/blockwise."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address


def quantize_blockwise(
    flat: Float[Tensor, " n"], code: Float32[Tensor, "256"], block_size: int
) -> tuple[UInt8[Tensor, " n"], Float32[Tensor, " blocks"]]:
    n = len(flat)
    codes = torch.empty(n, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    kernels().blockwise_quantize(
        address(flat), DTYPES[flat.dtype], n, block_size, address(code), address(codes), address(absmax)
    )
    return codes, absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, " n"],
    absmax: Float32[Tensor, " blocks"],
    code: Float32[Tensor, "256"],
    block_size: int,
    dtype: torch.dtype,
    offset: Float32[Tensor, ""] | None,
) -> Float[Tensor, " n"]:
    out = torch.empty(len(codes), dtype=dtype)
    kernels().blockwise_dequantize(
        address(codes), address(absmax), len(codes), block_size, address(code), DTYPES[dtype], address(out)
    )
    return out if offset is None else out.add_(offset)
