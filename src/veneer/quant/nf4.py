"""NF4: the 16 codes are quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.quant import four_bit
from veneer.quant.four_bit import FourBitWeight

NAME = "nf4"


def quantize(
    weight: Float[Tensor, "o i"], *, double_quant: bool = True, compute_dtype: torch.dtype | None = None
) -> FourBitWeight:
    """Return a weight in NF4. Raises ShapeError, NonFiniteError."""
    return four_bit.quantize(weight, NAME, double_quant=double_quant, compute_dtype=compute_dtype)
