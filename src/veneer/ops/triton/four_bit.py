"""NF4 and FP4 in Triton.

A byte holds two neighbours of a row. A tile of bytes is decoded into a tile of first and one of second neighbours. A
product with either takes the even or the odd features of the other operand.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.dispatch import MOST_ROWS_BY_CODES, slow_products
from veneer.ops.four_bit import FourBitLayout
from veneer.ops.four_bit_codes import NESTED, code_table
from veneer.ops.reference.four_bit import SMALLEST_ABSMAX, thresholds
from veneer.ops.triton.launch import block, launch, launch_exact

_TILE = 4096
_LEAST = tl.constexpr(SMALLEST_ABSMAX)


def quantize_4bit(
    flat: Float[Tensor, " n"], layout: FourBitLayout
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    packed = torch.empty(layout.n_bytes, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(layout.n_blocks, dtype=torch.float32, device=flat.device)
    blocks = max(1, _TILE // layout.block_size)
    grid = (triton.cdiv(layout.n_blocks, blocks),)
    args = flat, *_thresholds(layout.quant_type, flat.device), packed, absmax, layout.numel
    launch_exact(_quantize_kernel, grid, *args, BLOCKS=blocks, HALF=layout.block_size // 2)
    return packed, absmax


def dequantize_4bit(
    packed: UInt8[Tensor, " bytes"], absmax: Float32[Tensor, " blocks"], layout: FourBitLayout, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    out = torch.empty(layout.numel, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(layout.n_bytes, _TILE // 2),)
    args = packed, absmax, _table(layout.quant_type, packed.device), out, layout.numel
    launch_exact(_dequantize_kernel, grid, *args, BLOCK_SIZE=layout.block_size, BYTES=_TILE // 2)
    return out


def dequantize_nested_4bit(
    packed: UInt8[Tensor, " bytes"],
    nested: tuple[Tensor, Tensor, Tensor],
    code: Float32[Tensor, "256"],
    layout: FourBitLayout,
    dtype: torch.dtype,
) -> Float[Tensor, " n"]:
    out = torch.empty(layout.numel, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(layout.n_bytes, _TILE // 2),)
    args = packed, *nested, code, _table(layout.quant_type, packed.device), out, layout.numel
    launch_exact(_dequantize_nested_kernel, grid, *args, BLOCK_SIZE=layout.block_size, BYTES=_TILE // 2, NESTED=NESTED)
    return out


def matmul_4bit(
    x: Float[Tensor, "rows i"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows o"]:
    if not _is_few(x, layout):
        return x @ dequantize_4bit(packed, absmax, layout, x.dtype).view(layout.shape).T
    o, i = layout.shape
    out = x.new_empty(len(x), o)
    outputs = 16 if x.is_cuda else block(o, least=16, most=64)
    args = x, packed, absmax, _table(layout.quant_type, x.device), out, len(x), o, i
    forms = {
        "BLOCK_SIZE": layout.block_size,
        "ROWS": MOST_ROWS_BY_CODES,
        "OUTPUTS": outputs,
        "BYTES": 32 if x.dtype == torch.float32 else 64,
    }
    launch(_product_kernel, (triton.cdiv(o, outputs),), *args, **forms)
    return out


def matmul_t_4bit(
    dy: Float[Tensor, "rows o"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows i"]:
    if not _is_few(dy, layout):
        return dy @ dequantize_4bit(packed, absmax, layout, dy.dtype).view(layout.shape)
    o, i = layout.shape
    out = dy.new_empty(len(dy), i)
    args = dy, packed, absmax, _table(layout.quant_type, dy.device), out, len(dy), o, i
    forms = {"BLOCK_SIZE": layout.block_size, "ROWS": MOST_ROWS_BY_CODES, "OUTPUTS": 64, "BYTES": 16}
    launch(_transposed_kernel, (triton.cdiv(i // 2, 16),), *args, **forms)
    return out


def _is_few(x: Tensor, layout: FourBitLayout) -> bool:
    """Return True if the kernel that reads codes multiplies x: x has 1 to `MOST_ROWS_BY_CODES` rows, and each row of
    the weight begins with a whole byte. It is False on GPUs for which Triton's products are refused
    (`slow_products`).
    """
    return 0 < len(x) <= MOST_ROWS_BY_CODES and layout.shape[1] % 2 == 0 and not slow_products()


@cache
def _table(quant_type: str, device: torch.device) -> Float32[Tensor, "16"]:
    return code_table(quant_type).to(device)


@cache
def _thresholds(quant_type: str, device: torch.device) -> tuple[Float32[Tensor, "15"], UInt8[Tensor, "16"]]:
    midpoints, codes = thresholds(quant_type)
    return midpoints.to(device), codes.to(device)


@triton.jit
def _code(values, midpoints, codes):
    """Return the code of the nearest table value; on a midpoint, the lower one."""
    above = tl.zeros(values.shape, tl.int32)
    for index in tl.static_range(15):
        above += (values > tl.load(midpoints + index)).to(tl.int32)
    return tl.load(codes + above)


@triton.jit
def _decoded(packed, absmax, table, byte, inside, BLOCK_SIZE: tl.constexpr):
    """Decode the two values of each byte to float32."""
    return _values(packed, table, byte, inside, tl.load(absmax + byte // (BLOCK_SIZE // 2), mask=inside, other=0.0))


@triton.jit
def _values(packed, table, byte, inside, scale):
    codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    return tl.load(table + (codes >> 4)) * scale, tl.load(table + (codes & 15)) * scale


@triton.jit
def _quantize_kernel(x, midpoints, codes, packed, absmax, n, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    first = tl.load(x + 2 * byte, mask=2 * byte < n, other=0.0).to(tl.float32)
    second = tl.load(x + 2 * byte + 1, mask=2 * byte + 1 < n, other=0.0).to(tl.float32)
    most = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    # A maximum may pass NaN over: a sum does not.
    unsure = tl.sum(first * 0.0 + second * 0.0, axis=1)
    most = tl.where(unsure == 0.0, most, float("nan"))
    # The last, shorter block divides where the others multiply by the reciprocal; see the reference.
    short = (row + 1) * HALF * 2 > n
    held = tl.maximum(most, tl.full([BLOCKS], _LEAST, tl.float32))  # the constant alone is a double up to Triton 3.8
    tl.store(absmax + row, tl.where(short, held, most), mask=row * HALF * 2 < n)
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), held)[:, None]
    held = tl.broadcast_to(held[:, None], [BLOCKS, HALF])
    short = short[:, None]
    first = tl.where(short, tl.div_rn(first, held), first * inverse)
    second = tl.where(short, tl.div_rn(second, held), second * inverse)
    first = _code(tl.minimum(tl.maximum(first, -1.0), 1.0), midpoints, codes)
    second = _code(tl.minimum(tl.maximum(second, -1.0), 1.0), midpoints, codes)
    tl.store(packed + byte, (first << 4) | second, mask=2 * byte < n)


@triton.jit
def _dequantize_kernel(packed, absmax, table, out, n, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    first, second = _decoded(packed, absmax, table, byte, 2 * byte < n, BLOCK_SIZE)
    place = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + place, tl.interleave(first, second).to(out.dtype.element_ty), mask=place < n)


@triton.jit
def _dequantize_nested_kernel(
    packed,
    codes,
    scale,
    offset,
    code,
    table,
    out,
    n,
    BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Dequantize as `_dequantize_kernel` does, from an absmax that is itself quantized to 8-bit ``codes`` (double
    quantization).
    """
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    inside = 2 * byte < n
    block = byte // (BLOCK_SIZE // 2)
    absmax = tl.load(code + tl.load(codes + block, mask=inside, other=0).to(tl.int32))
    absmax = absmax * tl.load(scale + block // NESTED, mask=inside, other=0.0) + tl.load(offset)
    first, second = _values(packed, table, byte, inside, absmax)
    place = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + place, tl.interleave(first, second).to(out.dtype.element_ty), mask=place < n)


@triton.jit
def _product_kernel(
    x,
    packed,
    absmax,
    table,
    out,
    n_rows,
    o,
    i,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Compute ``x Wᵀ``: a program takes some outputs and walks along their rows of the weight."""
    rows = tl.arange(0, ROWS)[:, None]
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    half = i // 2
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for begin in range(0, half, BYTES):
        column = begin + tl.arange(0, BYTES)
        inside = (column < half)[:, None] & (outputs < o)[None, :]
        byte = outputs.to(tl.int64)[None, :] * half + column[:, None]
        first, second = _decoded(packed, absmax, table, byte, inside, BLOCK_SIZE)
        place = x + rows * i + 2 * column[None, :]
        given = (rows < n_rows) & (column < half)[None, :]
        even = tl.load(place, mask=given, other=0.0)
        odd = tl.load(place + 1, mask=given, other=0.0)
        total = tl.dot(even, first.to(even.dtype), total, input_precision="ieee")
        total = tl.dot(odd, second.to(odd.dtype), total, input_precision="ieee")
    inside = (rows < n_rows) & (outputs < o)[None, :]
    tl.store(out + rows * o + outputs[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_kernel(
    dy,
    packed,
    absmax,
    table,
    out,
    n_rows,
    o,
    i,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Compute ``dy W``: a program takes some columns and walks down the rows of the weight."""
    rows = tl.arange(0, ROWS)[:, None]
    half = i // 2
    column = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    even = tl.zeros([ROWS, BYTES], tl.float32)
    odd = tl.zeros([ROWS, BYTES], tl.float32)
    for begin in range(0, o, OUTPUTS):
        outputs = begin + tl.arange(0, OUTPUTS)
        inside = (outputs < o)[:, None] & (column < half)[None, :]
        byte = outputs.to(tl.int64)[:, None] * half + column[None, :]
        first, second = _decoded(packed, absmax, table, byte, inside, BLOCK_SIZE)
        given = (rows < n_rows) & (outputs < o)[None, :]
        gradient = tl.load(dy + rows * o + outputs[None, :], mask=given, other=0.0)
        even = tl.dot(gradient, first.to(gradient.dtype), even, input_precision="ieee")
        odd = tl.dot(gradient, second.to(gradient.dtype), odd, input_precision="ieee")
    place = out + rows * i + 2 * column[None, :]
    inside = (rows < n_rows) & (column < half)[None, :]
    tl.store(place, even.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 1, odd.to(out.dtype.element_ty), mask=inside)
