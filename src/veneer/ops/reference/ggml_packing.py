"""Bytes of ggml's blocks in plain torch: levels, scales and float16 values, packed and unpacked.

Levels are whole numbers ``(blocks, values of a block)``; bytes are uint8 ``(blocks, bytes of the field)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

Bytes = UInt8[Tensor, "blocks _"]
Levels = Int32[Tensor, "blocks _"]
PerBlock = Float32[Tensor, " blocks"]


def halves(*values: PerBlock) -> Bytes:
    """Return the bytes of numbers in float16, concatenated for each block."""
    return torch.stack(values, dim=1).half().view(torch.uint8)


def read_halves(packed: Bytes) -> Float32[Tensor, "blocks numbers"]:
    return packed.contiguous().view(torch.float16).float()


def rounded_half(value: Tensor) -> Tensor:
    """Return values rounded to float16, as a block stores them."""
    return value.half().float()


def pack_bits(levels: Levels, run: int, width: int) -> Bytes:
    """Return levels packed with ``width`` bits each. Of 8 / width consecutive runs of ``run`` levels, byte l holds
    level l of each run.

    The first run is in the lowest bits. Only the lowest ``width`` bits of each level are kept.
    """
    per_byte = 8 // width
    parts = (levels & ((1 << width) - 1)).view(len(levels), -1, per_byte, run)
    shifts = torch.arange(0, 8, width, dtype=torch.int32, device=levels.device)
    return (parts << shifts[:, None]).sum(dim=2).to(torch.uint8).view(len(levels), -1)


def unpack_bits(packed: Bytes, run: int, width: int) -> Levels:
    """Return the integers that `pack_bits` packed."""
    shifts = torch.arange(0, 8, width, dtype=torch.int32, device=packed.device)
    parts = (packed.int().view(len(packed), -1, 1, run) >> shifts[:, None]) & ((1 << width) - 1)
    return parts.reshape(len(packed), -1)


def pack_six_bits(scales: Int32[Tensor, "blocks 8"], minima: Int32[Tensor, "blocks 8"]) -> Bytes:
    """Return eight scales and eight minima of six bits as the twelve bytes of Q4_K and Q5_K."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return torch.cat([first, second, third], dim=1).to(torch.uint8)


def unpack_six_bits(packed: Bytes) -> tuple[Levels, Levels]:
    """Return the scales and minima that `pack_six_bits` packed."""
    first, second, third = packed.int().view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=1)
    return scales, minima


def pack_q3_scales(scales: Int32[Tensor, "blocks 16"]) -> Bytes:
    """Return sixteen scales of six bits (0 … 63) as the twelve bytes of Q3_K."""
    return torch.cat([pack_bits(scales, 8, 4), pack_bits(scales >> 4, 4, 2)], dim=1)


def unpack_q3_scales(packed: Bytes) -> Levels:
    return unpack_bits(packed[:, :8], 8, 4) | unpack_bits(packed[:, 8:], 4, 2) << 4
