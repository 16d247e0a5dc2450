"""NF4 and FP4 by csrc/four_bit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.four_bit import FourBitLayout
from veneer.ops.four_bit_codes import QUANT_TYPES
from veneer.ops.matmul import matmul
from veneer.ops.memory import address


def quantize_4bit(
    flat: Float[Tensor, " n"], layout: FourBitLayout
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    packed = torch.empty(layout.n_bytes, dtype=torch.uint8)
    absmax = torch.empty(layout.n_blocks, dtype=torch.float32)
    kernels().four_bit_quantize(
        address(flat),
        DTYPES[flat.dtype],
        layout.numel,
        layout.block_size,
        QUANT_TYPES.index(layout.quant_type),
        address(packed),
        address(absmax),
    )
    return packed, absmax


def dequantize_4bit(
    packed: UInt8[Tensor, " bytes"], absmax: Float32[Tensor, " blocks"], layout: FourBitLayout, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    out = torch.empty(layout.numel, dtype=dtype)
    kernels().four_bit_dequantize(
        address(packed),
        address(absmax),
        layout.numel,
        layout.block_size,
        QUANT_TYPES.index(layout.quant_type),
        DTYPES[dtype],
        address(out),
    )
    return out


def matmul_4bit(
    x: Float[Tensor, "rows i"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows o"]:
    if _has_product(x, layout, False):
        return _multiply(x, packed, absmax, layout, False)
    return matmul(x, dequantize_4bit(packed, absmax, layout, x.dtype).view(layout.shape).T, x.dtype)


def matmul_t_4bit(
    dy: Float[Tensor, "rows o"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows i"]:
    if _has_product(dy, layout, True):
        return _multiply(dy, packed, absmax, layout, True)
    return matmul(dy, dequantize_4bit(packed, absmax, layout, dy.dtype).view(layout.shape), dy.dtype)


def _has_product(x: Tensor, layout: FourBitLayout, transposed: bool) -> bool:
    """Return True if a kernel multiplies x, which depends on x's dtype and number of rows. If not, torch multiplies x
    by the decoded weight.
    """
    if x.dtype != torch.bfloat16:
        return False
    return bool(kernels().four_bit_has_product(len(x), layout.shape[1], layout.block_size, transposed))


def _multiply(x: Tensor, packed: Tensor, absmax: Tensor, layout: FourBitLayout, transposed: bool) -> Tensor:
    o, i = layout.shape
    out = x.new_empty(len(x), i if transposed else o)
    kernels().four_bit_multiply(
        address(packed),
        address(absmax),
        layout.block_size,
        QUANT_TYPES.index(layout.quant_type),
        o,
        i,
        address(x),
        len(x),
        transposed,
        address(out),
    )
    return out
