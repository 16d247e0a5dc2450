"""Rows for the kernels: tensors laid out with a fixed number of values between one row and the next."""

from __future__ import annotations

from torch import Tensor

from veneer.ops.traced import Traced


def with_rows(x: Tensor) -> Tensor:
    """x as (n, d) with a contiguous last axis: a view wherever one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def same_dtype(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the dtype of what it belongs to."""
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def put_back(rows: Tensor, x: Tensor) -> None:
    """Write what a kernel left in ``with_rows(x)`` into x, if x's layout has rows only as a copy."""
    if rows.data_ptr() != x.data_ptr() and not isinstance(x, Traced):
        x.copy_(rows.view(x.shape))
