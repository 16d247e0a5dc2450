"""Packed codes in plain torch: the specification of the layout, and of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from veneer.ops.code_groups import MIDDLES, NUMBERS, UNIT, CodeGroups
from veneer.ops.four_bit_codes import code_table
from veneer.ops.packed import BLOCK, BLOCKS
from veneer.ops.reference.ggml_non_linear import VALUES
from veneer.ops.reference.int8 import dequantize_int8
from veneer.ops.reference.scaled import FLOATS_8, e2m1_values
from veneer.ops.scaled import powers

if TYPE_CHECKING:
    from veneer.ops.packed_codes import PackedCodes

PANEL = BLOCK * BLOCKS


def pack_4bit(made: PackedCodes, packed: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    o, i = made.shape
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(o, i)
    scales = absmax.repeat_interleave(block_size)[: o * i : made.unit].view(o, -1)
    return _panels(made, codes, [scales])


def pack_int8(made: PackedCodes, codes: Tensor, absmax: Tensor) -> Tensor:
    return _panels(made, codes.view(torch.uint8), [absmax[:, None]])


def pack_groups(made: PackedCodes, groups: CodeGroups) -> Tensor:
    heads = [groups.scales] if groups.beside is None else [groups.scales, groups.beside]
    return _panels(made, groups.codes, heads)


def codes(weight: PackedCodes) -> Tensor:
    found, _ = _rows(weight)
    if weight.coding in NUMBERS:
        return found
    return found.view(torch.int8) if weight.coding == "int8" else (found[:, ::2] << 4 | found[:, 1::2]).reshape(-1)


def dense(weight: PackedCodes) -> Float[Tensor, "o i"]:
    found, heads = _rows(weight)
    if weight.coding == "int8":
        return dequantize_int8(found.view(torch.int8), heads[0][:, 0], weight.dtype)
    scales, *beside = (head.repeat_interleave(weight.unit, dim=1)[:, : weight.shape[1]] for head in heads)
    numbers = _numbers(weight.coding, found)
    if weight.formula in ("less_zero", "apart"):
        numbers = (numbers - beside[0]).to(weight.rounding).float()
    values = numbers * scales + beside[0] if weight.formula == "added" else numbers * scales
    return values.to(weight.rounding).to(weight.dtype)


def matmul(weight: PackedCodes, x: Float[Tensor, "n i"], onto: Tensor | None, out: Tensor) -> None:
    sums = x.float() @ dense(weight).float().T
    out.copy_(sums if onto is None else onto.float() + sums)


def _panels(made: PackedCodes, codes: Tensor, heads: list[Tensor]) -> Tensor:
    """Arrange codes (o, i), one a byte, and scales (o, units) in panels."""
    filled = _filled(functional.pad(codes, (0, made.depth - codes.shape[1])))
    units = filled.view(len(filled), made.depth // made.unit, made.unit)
    parts = [torch.split(_filled(head), PANEL) for head in heads]
    panels = zip(*parts, torch.split(units, PANEL), strict=True)
    return torch.cat([_joined([h.T for h in head], _stored(panel, made.bits)) for *head, panel in panels])


def _stored(units: Tensor, bits: int) -> Tensor:
    """Arrange a panel's codes (outputs, units, unit) in memory order, unit by unit."""
    if bits < 4:
        return _planes(units, bits)
    words = _bytes_in_pairs(units) if bits == 8 else _nibbles_in_words(units)
    return _bytes(words.permute(1, 2, 0))


def _nibbles_in_words(units: Tensor) -> Tensor:
    """Pack every 16 four-bit codes into a word of eight bytes: the even codes into the first four bytes, the odd codes
    into the last four.

    Of two codes in one byte, the earlier is in the lower bits.
    """
    o, n, _ = units.shape
    quads = units.reshape(o, n, -1, 4, 4)
    words = torch.stack([quads[..., 0] | quads[..., 2] << 4, quads[..., 1] | quads[..., 3] << 4], dim=3)
    return words.view(o, n, -1, 8).view(torch.int64)[..., 0]


def _bytes_in_pairs(units: Tensor) -> Tensor:
    """View codes of 8 bits as int16, so that the codes of two neighbouring inputs are moved together."""
    return units.contiguous().view(torch.int16)


def _planes(units: Tensor, bits: int) -> Tensor:
    """Pack codes of 2 or 3 bits, 16 at a time. A 32-bit word for each output holds the lower two bits of its 16 codes.

    For codes of 3 bits, further words hold the third bits of all outputs.
    """
    o, n, width = units.shape
    pairs = units.to(torch.int64).view(o, n, width // UNIT, 8, 2)  # (.., inputs 2 m and 2 m + 1)
    low = ((pairs & 3) << _places(2, 16)).sum(dim=(3, 4)).permute(1, 2, 0)  # (n, groups, o)
    found = [_bytes(_words(low).flatten(0, 1)).view(n, width // UNIT, -1)]
    if bits == 3:
        blocks = (pairs >> 2).view(o // BLOCK, BLOCK, n, width // UNIT, 8, 2).permute(2, 3, 0, 4, 1, 5)
        thirds = (blocks << 2 * torch.arange(BLOCK)[:, None] << torch.arange(2)).sum(dim=(4, 5))
        found.append(_bytes(_words(thirds).flatten(0, 1)).view(n, width // UNIT, -1))
    return torch.cat(found, dim=2).flatten(1)


def _places(apart: int, odd: int) -> Tensor:
    """Return the first bits in a word, (8, 2), of the codes of inputs 2 m and 2 m + 1: ``apart * m`` and
    ``apart * m + odd``.
    """
    return apart * torch.arange(8)[:, None] + odd * torch.arange(2)


def _words(x: Tensor) -> Tensor:
    """Return integers below 2 ** 32 as int32 with the same bits."""
    return torch.where(x < 1 << 31, x, x - (1 << 32)).to(torch.int32)


def _filled(rows: Tensor) -> Tensor:
    """Pad the outputs with zeros to whole blocks."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % BLOCK, *rows.shape[1:])])


def _joined(heads: list[Tensor], codes: Tensor) -> Tensor:
    """Return the bytes of a panel: for each unit (the inputs that share a scale), the scales of all outputs, then their
    codes.
    """
    return torch.cat([*map(_bytes, heads), codes], dim=1).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten(1).view(torch.uint8)


def _rows(weight: PackedCodes) -> tuple[Tensor, list[Float32[Tensor, "o units"]]]:
    """Return the codes (o, i), one a byte, and the numbers stored in front of each unit's codes: its scale, and a
    second one in some formulas.
    """
    (o, i), units, size = weight.shape, weight.depth // weight.unit, weight.scales.itemsize
    found: list[list[Tensor]] = []
    for first in range(0, o, PANEL):
        across = min(PANEL, o + -o % BLOCK - first)
        start = first * weight.output_bytes
        panel = weight.panels[start : start + across * weight.output_bytes].view(units, -1)
        split = across * weight.head_bytes
        stored = torch.split(panel[:, :split], across * size, dim=1)
        heads = (powers(head.contiguous().view(weight.scales)).T for head in stored)
        found.append([_codes_of(panel[:, split:].contiguous(), across, weight), *heads])
    codes, *numbers = (torch.cat(parts)[:o] for parts in zip(*found, strict=True))
    return codes[:, :i].contiguous(), [each.contiguous() for each in numbers]


def _codes_of(codes: Tensor, across: int, weight: PackedCodes) -> Tensor:
    if weight.bits == 8:
        return codes.view(-1, across, 2).transpose(0, 1).reshape(across, -1)
    if weight.bits < 4:
        return _codes_of_planes(codes, across, weight.bits)
    words = codes.view(torch.int32).view(-1, across, 2).transpose(0, 1)
    shifts = 4 * torch.arange(8, device=codes.device)
    return (words[:, :, None] >> shifts[:, None] & 15).reshape(across, -1).to(torch.uint8)


def _codes_of_planes(codes: Tensor, across: int, bits: int) -> Tensor:
    groups = codes.view(-1, across * 2 * bits)
    low = groups[:, : 4 * across].contiguous().view(torch.int32)  # (groups, across)
    found = low[:, :, None, None] >> _places(2, 16) & 3
    if bits == 3:
        thirds = groups[:, 4 * across :].contiguous().view(torch.int32).view(len(groups), -1, 1, 8, 1)
        one = thirds >> (2 * torch.arange(BLOCK)[:, None, None] + torch.arange(2)) & 1
        found |= one.reshape(found.shape) << 2
    return found.transpose(0, 1).reshape(across, -1).to(torch.uint8)


def _numbers(coding: str, codes: Tensor) -> Float32[Tensor, "o i"]:
    """Decode codes to the numbers that they stand for."""
    if coding in FLOATS_8:
        return codes.view(FLOATS_8[coding]).float()
    if coding == "e2m1":
        return e2m1_values(codes)
    if coding in ("nf4", "fp4", "iq4"):
        table = torch.tensor(VALUES, dtype=torch.float32) if coding == "iq4" else code_table(coding)
        return table.to(codes.device)[codes.int()]
    return codes.view(torch.int8).float() if coding == "signed8" else codes.float() - MIDDLES.get(coding, 0)
