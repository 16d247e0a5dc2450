"""Element types that the training kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

SERVED = (torch.float32, torch.bfloat16)


def is_served(*tensors: Tensor) -> bool:
    """Return True if the training kernels have a form for these element types."""
    return all(t.dtype in SERVED for t in tensors)
