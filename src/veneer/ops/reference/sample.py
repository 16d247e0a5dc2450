"""Choice of tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest(logits: Tensor) -> Tensor:
    best = logits.max(dim=-1)
    first = (logits == best.values[:, None]).int().argmax(dim=-1)
    return torch.where(torch.isfinite(best.values), first, -1)
