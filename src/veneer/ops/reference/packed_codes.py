"""Packed codes in plain torch: the specification of the layout, and of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from veneer.ops.four_bit_codes import code_table
from veneer.ops.packed import BLOCK, BLOCKS
from veneer.ops.reference.int8 import dequantize_int8

if TYPE_CHECKING:
    from veneer.ops.packed_codes import PackedCodes

PANEL = BLOCK * BLOCKS


def pack_4bit(made: PackedCodes, packed: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    o, i = made.shape
    units = i // made.unit
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(o, units, made.unit // 16, 8, 2)
    powers = 1 << 4 * torch.arange(8, device=codes.device)
    words = _filled((codes.long() * powers[:, None]).sum(-2))
    scales = _filled(absmax.repeat_interleave(block_size)[: o * i : made.unit].view(o, units))
    words = torch.where(words < 1 << 31, words, words - (1 << 32)).int()
    panels = zip(torch.split(words, PANEL), torch.split(scales, PANEL), strict=True)
    return torch.cat([_joined(s.T, w.permute(1, 2, 0, 3)) for w, s in panels])


def pack_int8(made: PackedCodes, codes: Tensor, absmax: Tensor) -> Tensor:
    pairs = _filled(functional.pad(codes, (0, made.unit - codes.shape[1]))).view(-1, made.unit // 2, 2)
    panels = zip(torch.split(pairs, PANEL), torch.split(_filled(absmax), PANEL), strict=True)
    return torch.cat([_joined(s[None], p.transpose(0, 1)[None]) for p, s in panels])


def codes(weight: PackedCodes) -> Tensor:
    found, _ = _rows(weight)
    return found if weight.coding == "int8" else (found[:, ::2] << 4 | found[:, 1::2]).reshape(-1)


def dense(weight: PackedCodes) -> Float[Tensor, "o i"]:
    found, scales = _rows(weight)
    if weight.coding == "int8":
        return dequantize_int8(found, scales[:, 0], weight.dtype)
    values = code_table(weight.coding).to(found.device)[found.int()]
    return (values * scales.repeat_interleave(weight.unit, dim=1)).to(weight.dtype)


def matmul(weight: PackedCodes, x: Float[Tensor, "n i"], onto: Tensor | None, out: Tensor) -> None:
    sums = x.float() @ dense(weight).float().T
    out.copy_(sums if onto is None else onto.float() + sums)


def _filled(rows: Tensor) -> Tensor:
    """Outputs filled up with zeros to whole blocks."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % BLOCK, *rows.shape[1:])])


def _joined(scales: Tensor, codes: Tensor) -> Tensor:
    """Scales and codes of each unit, one behind the other."""
    return torch.cat([_bytes(scales), _bytes(codes)], dim=1).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten(1).view(torch.uint8)


def _rows(weight: PackedCodes) -> tuple[Tensor, Tensor]:
    """The codes (o, i) and the scales (o, units)."""
    (o, i), units = weight.shape, weight.depth // weight.unit
    found = []
    for first in range(0, o, PANEL):
        across = min(PANEL, o + -o % BLOCK - first)
        start = first * weight.output_bytes
        panel = weight.panels[start : start + across * weight.output_bytes].view(units, -1)
        scales = panel[:, : across * 4].contiguous().view(torch.float32).T
        found.append((_codes_of(panel[:, across * 4 :].contiguous(), across, weight), scales))
    codes, scales = (torch.cat(parts)[:o] for parts in zip(*found, strict=True))
    return codes[:, :i], scales.contiguous()


def _codes_of(codes: Tensor, across: int, weight: PackedCodes) -> Tensor:
    if weight.coding == "int8":
        return codes.view(torch.int8).view(-1, across, 2).transpose(0, 1).reshape(across, -1)
    words = codes.view(torch.int32).view(-1, across, 2).transpose(0, 1)
    shifts = 4 * torch.arange(8, device=codes.device)
    return (words[:, :, None] >> shifts[:, None] & 15).reshape(across, -1).to(torch.uint8)
