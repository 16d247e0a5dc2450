"""Element types that the training kernels support."""

from __future__ import annotations

import torch
from torch import Tensor

SERVED = (torch.float32, torch.bfloat16)


def is_served(*tensors: Tensor) -> bool:
    """Return True if the training kernels support the dtypes of these tensors."""
    return all(t.dtype in SERVED for t in tensors)
