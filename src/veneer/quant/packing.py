"""Conversion of quantized weights into the layout of the serving kernels."""

from __future__ import annotations

import torch

from veneer.ops.packed_codes import PackedCodes, fits_4bit, fits_int8
from veneer.quant.four_bit import FourBitWeight
from veneer.quant.int8 import Int8Weight
from veneer.quant.product import CodedWeight


def packed_codes(weight: CodedWeight, dtype: torch.dtype) -> PackedCodes | None:
    """Return packed NF4, FP4 or int8 codes, for values rounded to ``dtype``; None if they have no packed form.

    A doubly quantized absmax is expanded to float32.
    """
    if isinstance(weight, FourBitWeight):
        absmax = weight.scales()
        fits = fits_4bit(absmax, weight.layout, dtype)
        return PackedCodes.pack_4bit(weight.packed, absmax, weight.layout, dtype) if fits else None
    if isinstance(weight, Int8Weight):
        fits = fits_int8(weight.codes, weight.absmax, dtype)
        return PackedCodes.pack_int8(weight.codes, weight.absmax, dtype) if fits else None
    return None
