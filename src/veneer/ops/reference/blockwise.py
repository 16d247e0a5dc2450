"""Blockwise 8-bit codes in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor


def quantize_blockwise(
    flat: Float[Tensor, " n"], code: Float32[Tensor, "256"], block_size: int
) -> tuple[UInt8[Tensor, " n"], Float32[Tensor, " blocks"]]:
    blocks = _blocks(flat.float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    # A block of zeros has no scale: its values stay 0 and find the index of 0.
    inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
    scaled = (blocks * inverse[:, None]).clamp(-1, 1).reshape(-1)[: len(flat)]
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8), absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, " n"],
    absmax: Float32[Tensor, " blocks"],
    code: Float32[Tensor, "256"],
    block_size: int,
    dtype: torch.dtype,
    offset: Float32[Tensor, ""] | None,
) -> Float[Tensor, " n"]:
    values = (code[codes.int()] * absmax.repeat_interleave(block_size)[: len(codes)]).to(dtype)
    return values if offset is None else values.add_(offset)


def _blocks(flat: Float[Tensor, " n"], block_size: int) -> Float[Tensor, "blocks block_size"]:
    return torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
