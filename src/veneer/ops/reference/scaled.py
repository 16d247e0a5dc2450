"""Matrices of small numbers with scales in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from veneer.ops.bits import unpack
from veneer.ops.scaled import ScaledCodes, powers

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOATS_8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def decode(w: ScaledCodes, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k columns"]:
    numbers = _numbers(w, w.codes[index]).to(w.rounding)
    whole = torch.nn.functional.pad(numbers, (0, -w.columns % w.group)) if w.columns % w.group else numbers
    blocks = whole.view(len(numbers), w.groups, w.group)
    owners = torch.arange(len(w.codes), device=w.codes.device)[index] // w.height
    scales, zeros = powers(w.scales), w.zeros
    if w.overall is not None:
        scales = scales / w.overall if w.divides else scales * w.overall
    if zeros is not None:
        blocks = blocks.sub_(zeros.reshape(-1, w.groups)[owners][:, :, None].to(w.rounding))
    elif w.coding == "whole":
        blocks = blocks.sub_(1 << w.bits - 1)
    values = blocks.mul_(scales.view(-1, w.groups)[owners][:, :, None].to(w.rounding))
    return values.view(len(numbers), -1)[:, : w.columns].to(torch.float32)


def matmul(x: Float[Tensor, "n i"], w: ScaledCodes) -> Float[Tensor, "n o"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ decode(w, slice(None)).to(wide).T).to(x.dtype)


def e2m1_values(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Return the values of E2M1 codes: a sign, two bits of exponent and one of mantissa."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _numbers(w: ScaledCodes, codes: Tensor) -> Tensor:
    """Decode codes to their exact numbers, in new memory."""
    if w.coding in FLOATS_8:
        return codes.view(FLOATS_8[w.coding]).to(torch.float32)
    found = unpack(codes.view(torch.uint8), w.bits, w.columns)
    return e2m1_values(found) if w.coding == "e2m1" else found.to(torch.float32)
