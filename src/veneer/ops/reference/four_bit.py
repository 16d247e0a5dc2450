"""NF4 and FP4 in plain torch: the specification that the kernels are tested against."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.four_bit_codes import NESTED, code_table
from veneer.ops.reference.blockwise import dequantize_blockwise

if TYPE_CHECKING:
    from veneer.ops.four_bit import FourBitLayout

# Keeps 1 / absmax finite; bitsandbytes' constant.
SMALLEST_ABSMAX = 1e-38


@cache
def thresholds(quant_type: str) -> tuple[Float32[Tensor, "15"], UInt8[Tensor, "16"]]:
    """Return the midpoints between neighbouring table values, and the code of each interval between them."""
    values = code_table(quant_type)
    order = torch.argsort(values)
    ranked = values[order]
    return (ranked[:-1] + ranked[1:]) / 2, order.to(torch.uint8)


def scaled_blocks(
    flat: Float[Tensor, " n"], block_size: int
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " blocks"]]:
    """Return each value divided by its block's largest magnitude, and those magnitudes.

    Full blocks multiply by the reciprocal; a last, shorter block divides, and its absmax is at least
    `SMALLEST_ABSMAX`. bitsandbytes computes the same, to the last bit.
    """
    values = flat.float()
    n_full = len(values) // block_size * block_size
    full, rest = values[:n_full].view(-1, block_size), values[n_full:]
    absmax = full.abs().amax(dim=1) if n_full else values.new_zeros(0)
    scaled = (full * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).clamp(-1, 1).reshape(-1)
    if len(rest) == 0:
        return scaled, absmax
    last = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
    return torch.cat([scaled, (rest / last).clamp(-1, 1)]), torch.cat([absmax, last[None]])


def quantize_4bit(
    flat: Float[Tensor, " n"], layout: FourBitLayout
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    """Return the nearest code of each value; a value on a midpoint takes the lower table value."""
    scaled, absmax = scaled_blocks(flat, layout.block_size)
    scaled = torch.nn.functional.pad(scaled, (0, len(scaled) % 2))
    midpoints, codes = thresholds(layout.quant_type)
    nearest = codes.to(flat.device)[torch.bucketize(scaled, midpoints.to(flat.device))]
    return (nearest[::2] << 4) | nearest[1::2], absmax


def dequantize_4bit(
    packed: UInt8[Tensor, " bytes"], absmax: Float32[Tensor, " blocks"], layout: FourBitLayout, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """Return ``table[code] * absmax`` in float32, then rounded to dtype."""
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: layout.numel]
    values = code_table(layout.quant_type).to(packed.device)[codes.int()]
    scale = absmax.repeat_interleave(layout.block_size)[: layout.numel]
    return (values * scale).to(dtype)


def dequantize_nested_4bit(
    packed: UInt8[Tensor, " bytes"],
    nested: tuple[Tensor, Tensor, Tensor],
    code: Float32[Tensor, "256"],
    layout: FourBitLayout,
    dtype: torch.dtype,
) -> Float[Tensor, " n"]:
    codes, scale, offset = nested
    absmax = dequantize_blockwise(codes, scale, code, NESTED, torch.float32, offset)
    return dequantize_4bit(packed, absmax, layout, dtype)


def matmul_4bit(
    x: Float[Tensor, "rows i"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows o"]:
    return x @ dequantize_4bit(packed, absmax, layout, x.dtype).view(layout.shape).T


def matmul_t_4bit(
    dy: Float[Tensor, "rows o"],
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
) -> Float[Tensor, "rows i"]:
    return dy @ dequantize_4bit(packed, absmax, layout, dy.dtype).view(layout.shape)
