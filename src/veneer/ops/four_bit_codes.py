"""Values of the 16 codes of NF4 and FP4."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float32
from torch import Tensor

from veneer.errors import ConfigError

NESTED = 256
"""Blocks whose absmax in 8 bits have one scale, in double quantization."""
QUANT_TYPES = ("nf4", "fp4")
# NF4: quantiles of a standard normal, scaled to [-1, 1] with an exact zero (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4: one sign, two exponent and one mantissa bit; twelfths, indexed by the bit pattern without the sign.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@cache
def code_table(quant_type: str) -> Float32[Tensor, "16"]:
    """Return the value of each of the 16 codes. Raises ConfigError for an unknown type.

    The tensor is shared: do not write into it.
    """
    if quant_type not in QUANT_TYPES:
        raise ConfigError(f"quant_type is {quant_type!r}; allowed: {list(QUANT_TYPES)}")
    if quant_type == "nf4":
        return torch.tensor(NF4)
    magnitudes = torch.tensor(FP4_TWELFTHS) / 12.0
    return torch.cat([magnitudes, -magnitudes])
