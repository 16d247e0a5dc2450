"""How tensors are laid before the kernels: rows, a fixed number of values apart."""

from __future__ import annotations

import torch
from torch import Tensor

SERVED = (torch.float32, torch.bfloat16)


def is_served(*tensors: Tensor) -> bool:
    """Whether the training kernels have a form for these element types."""
    return all(t.dtype in SERVED for t in tensors)


def with_rows(x: Tensor) -> Tensor:
    """x as (n, d) with a contiguous last axis: a view wherever one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def same_dtype(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the dtype of what it belongs to."""
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
