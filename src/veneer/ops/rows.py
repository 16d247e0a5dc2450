"""Rows for the kernels: tensors with a fixed stride between rows."""

from __future__ import annotations

from torch import Tensor

from veneer.ops.traced import Traced


def with_rows(x: Tensor) -> Tensor:
    """Return x as (n, d) with a contiguous last axis: a view if one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def same_dtype(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the dtype of its tensor."""
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def put_back(rows: Tensor, x: Tensor) -> None:
    """Copy the kernel's result in ``with_rows(x)`` into x, if ``with_rows`` had to copy x."""
    if rows.data_ptr() != x.data_ptr() and not isinstance(x, Traced):
        x.copy_(rows.view(x.shape))
