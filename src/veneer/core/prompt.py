"""What a PromptDelta means: rows in front of the embedded input."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from veneer.core.records import PromptDelta


def replace_leading(delta: PromptDelta, embedded: Float[Tensor, "rows length d"]) -> Float[Tensor, "rows length d"]:
    """``embedded`` with its first n positions replaced by the virtual tokens, in its dtype."""
    n = delta.embeddings.shape[0]
    tokens = delta.embeddings.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
    return torch.cat([tokens, embedded[:, n:]], dim=1)


def with_leading(x: Shaped[Tensor, "rows length"], n: int, value: float) -> Shaped[Tensor, "rows n_plus_length"]:
    """``x`` with n columns of one value in front."""
    return torch.cat([x.new_full((x.shape[0], n), value), x], dim=1)
