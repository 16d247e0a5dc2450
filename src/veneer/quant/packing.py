"""Conversion of quantized weights into the layout of the serving kernels, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.bits import pack, unpack
from veneer.ops.code_groups import MIDDLES, CodeGroups, even_groups
from veneer.ops.packed import BLOCK, BLOCKS
from veneer.ops.packed_codes import PackedCodes, fits_4bit, fits_int8
from veneer.ops.scaled import ScaledCodes, powers
from veneer.quant.blocks import BlockWeight, ScaledWeight
from veneer.quant.four_bit import FourBitWeight
from veneer.quant.ggml import GgmlWeight
from veneer.quant.grouped import GroupedWeight
from veneer.quant.int8 import Int8Weight
from veneer.quant.product import CodedWeight

PACKED_VALUES = 1 << 22
"""Values that are packed at a time, so that codes of a byte or more are alive for few rows."""


def packed_codes(weight: CodedWeight, dtype: torch.dtype) -> PackedCodes | None:
    """Pack a quantized weight for the kernels, with decoded values rounded to ``dtype``. Return None if that is
    impossible.

    A doubly quantized absmax is expanded to float32. These cannot be packed: columns sorted by group (GPTQ's
    ``g_idx``), groups that are not a multiple of 16 inputs, scales beyond 1e±30, and integers whose values may be
    infinite in float16.
    """
    if isinstance(weight, FourBitWeight):
        absmax = weight.scales()
        fits = fits_4bit(absmax, weight.layout, dtype)
        return PackedCodes.pack_4bit(weight.packed, absmax, weight.layout, dtype) if fits else None
    if isinstance(weight, Int8Weight):
        fits = fits_int8(weight.codes, weight.absmax, dtype)
        return PackedCodes.pack_int8(weight.codes, weight.absmax, dtype) if fits else None
    return _packed_groups(weight, dtype) if isinstance(weight, BlockWeight) and all(weight.shape) else None


def _packed_groups(weight: BlockWeight, dtype: torch.dtype) -> PackedCodes | None:
    groups_of = _groups_of(weight)
    if groups_of is None:
        return None
    try:
        return PackedCodes.pack_groups(_parts(groups_of, *weight.shape), dtype)
    except ShapeError:  # told by the values, which are looked at part by part
        return None


def unpacked_codes(weight: CodedWeight, packed: PackedCodes) -> Tensor | None:
    """Return packed codes in the weight's own layout, or None if that layout mixes codes with scales.

    ``weight`` may have its codes on the meta device.
    """
    if isinstance(weight, GgmlWeight):
        return None
    found = packed.codes()
    if not isinstance(weight, ScaledWeight):
        return found
    w = weight.scaled
    return pack(found - _raised(w), w.bits)


def _parts(groups_of: Callable[[slice], CodeGroups], o: int, i: int) -> Iterator[CodeGroups]:
    panel = BLOCK * BLOCKS
    step = max(1, PACKED_VALUES // i // panel) * panel
    return (groups_of(slice(start, min(start + step, o))) for start in range(0, o, step))


def _groups_of(weight: BlockWeight) -> Callable[[slice], CodeGroups] | None:
    """Return a function that returns the `CodeGroups` of a slice of the weight's rows.

    Return None if the format cannot be expressed as `CodeGroups`.
    """
    if isinstance(weight, GgmlWeight):
        return weight.groups if weight.is_narrow else None
    if not isinstance(weight, ScaledWeight) or (isinstance(weight, GroupedWeight) and weight.order is not None):
        return None
    w = weight.scaled
    scales = _by_unit(_by_row(w.scales, w), w)
    zeros = None if w.zeros is None else _by_unit(_by_row(w.zeros, w), w)
    if scales is None:
        return None
    numbers, formula = _form(w)

    def groups_of(rows: slice) -> CodeGroups:
        codes = w.codes[rows].view(torch.uint8)
        codes = unpack(codes, w.bits, w.columns) + _raised(w)
        beside = None if zeros is None else zeros[rows].to(scales.dtype)
        return CodeGroups(codes, numbers, scales[rows], beside, formula, w.rounding)

    return groups_of


def _form(w: ScaledCodes) -> tuple[str, str]:
    """Return the names of the number type and of the decoding formula with which `CodeGroups` describes these codes.

    Integers without zeros are signed; formats of floats keep their own type.
    """
    if w.coding != "whole":
        return w.coding, "scaled"
    width = _width(w)
    if w.zeros is None:
        return f"signed{width}", "scaled"
    exact = w.zeros.dtype == torch.uint8 and w.scales.dtype.itemsize == 2
    return f"unsigned{width}", "less_zero" if exact else "apart"


def _raised(w: ScaledCodes) -> int:
    """Return the number that packing adds to each code, so that 0 is where the kernels expect it.

    In a weight without zeros, the code ``2 ** (bits - 1)`` means 0. The kernels expect the middle of the packed width,
    or 0 in a signed byte.
    """
    if w.coding != "whole" or w.zeros is not None:
        return 0
    width = _width(w)
    return (MIDDLES[f"signed{width}"] if width < 8 else 256) - (1 << w.bits - 1)


def _width(w: ScaledCodes) -> int:
    """Return the number of bits in which integers are packed: 2, 3, 4 or 8."""
    return next(width for width in (2, 3, 4, 8) if w.bits <= width)


def _by_row(x: Tensor, w: ScaledCodes) -> Tensor:
    """Return scales or zeros as (o, groups), with one row for each row of the weight."""
    x = x.reshape(-1, w.groups)
    return x if w.height == 1 else x.repeat_interleave(w.height, dim=0)[: len(w.codes)]


def _by_unit(x: Tensor, w: ScaledCodes) -> Tensor | None:
    """Return scales or zeros for equal groups, each a multiple of 16 inputs or a whole row; None if no such groups
    divide a row.
    """
    if x.dtype == torch.float8_e8m0fnu:
        x = x.view(torch.uint8)
    if x.dtype == torch.float8_e4m3fn or w.overall is not None:
        x = powers(x)
        x = x if w.overall is None else x / w.overall if w.divides else x * w.overall
    return even_groups(x, w.columns, w.group)
