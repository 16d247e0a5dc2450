"""Bias of attention that falls with distance (ALiBi; Press et al. 2022, arXiv 2108.12409)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.attention import alibi_slopes
from veneer.ops.paged_attention import UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Alibi:
    """Bias of a score: -``scale`` · slope · distance, with a slope for each of ``n_heads``.

    ``rounded``: slopes, positions and their products are rounded to bfloat16, in models of any dtype (Falcon).
    """

    n_heads: int
    scale: float = 1.0
    rounded: bool = False

    def bias(self, n_positions: int) -> Float[Tensor, "n_heads n_padded"]:
        """Return a float32 number for each position. The bias of a score is the key's number minus the query's.

        Positions are padded to a multiple of 16, as the kernels read them.
        """
        slopes, positions = torch.tensor(alibi_slopes(self.n_heads)), torch.arange(-(-n_positions // UNIT) * UNIT)
        if self.rounded:
            slopes, positions = slopes.bfloat16(), positions.bfloat16()
        return (slopes[:, None] * positions).float() * self.scale
