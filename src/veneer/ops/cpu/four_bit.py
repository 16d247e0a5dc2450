"""NF4 and FP4 by csrc/four_bit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.four_bit import QUANT_TYPES, FourBitLayout


def quantize_4bit(
    flat: Float[Tensor, " n"], layout: FourBitLayout
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    packed = torch.empty(layout.n_bytes, dtype=torch.uint8)
    absmax = torch.empty(layout.n_blocks, dtype=torch.float32)
    kernels().four_bit_quantize(
        flat.data_ptr(),
        DTYPES[flat.dtype],
        layout.numel,
        layout.block_size,
        QUANT_TYPES.index(layout.quant_type),
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


def dequantize_4bit(
    packed: UInt8[Tensor, " bytes"], absmax: Float32[Tensor, " blocks"], layout: FourBitLayout, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    out = torch.empty(layout.numel, dtype=dtype)
    kernels().four_bit_dequantize(
        packed.data_ptr(),
        absmax.data_ptr(),
        layout.numel,
        layout.block_size,
        QUANT_TYPES.index(layout.quant_type),
        DTYPES[dtype],
        out.data_ptr(),
    )
    return out
