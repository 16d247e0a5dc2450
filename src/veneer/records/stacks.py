"""Low-rank factors of experts stacked in one tensor, in PEFT's form of two matrices.

``A (r E, i)`` holds the experts one after another. In ``B (o, r E)`` the expert index varies fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def unstack(a: Float[Tensor, "rE i"], b: Float[Tensor, "o rE"], experts: int) -> tuple[Tensor, Tensor]:
    """Return A (E, r, i) and B (E, o, r), a pair for each expert, as views."""
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def stack(pairs: Sequence[tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]]) -> tuple[Tensor, Tensor]:
    """Return the two matrices of the experts' pairs: the inverse of `unstack`."""
    a, b = torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs], dim=-1)
    return a, b.reshape(b.shape[0], -1)
