"""Formula of a PromptDelta: virtual tokens in front of the embedded input."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def replace_leading(
    tokens: Float[Tensor, "*rows n d"], embedded: Float[Tensor, "rows length d"]
) -> Float[Tensor, "rows length d"]:
    """Return ``embedded`` with its first n positions replaced by virtual tokens: one set for all rows, or one each."""
    rows = tokens.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
    return torch.cat([rows, embedded[:, tokens.shape[-2] :]], dim=1)


def with_leading(x: Shaped[Tensor, "rows length"], n: int, value: float) -> Shaped[Tensor, "rows n_plus_length"]:
    """Return ``x`` with n columns of one value in front."""
    return torch.cat([x.new_full((x.shape[0], n), value), x], dim=1)
