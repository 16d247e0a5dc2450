"""FP4: the 16 codes are 4-bit floating-point numbers, one sign, two exponent and one mantissa bit (bitsandbytes)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.quant import four_bit
from veneer.quant.four_bit import FourBitWeight

NAME = "fp4"


def quantize(
    weight: Float[Tensor, "o i"], *, double_quant: bool = True, compute_dtype: torch.dtype | None = None
) -> FourBitWeight:
    """Return a weight in FP4. Raises ShapeError, NonFiniteError."""
    return four_bit.quantize(weight, NAME, double_quant=double_quant, compute_dtype=compute_dtype)
