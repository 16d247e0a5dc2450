"""Rows for the kernels: tensors with a fixed stride between rows."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.traced import Traced, is_tracing


def with_rows(x: Tensor) -> Tensor:
    """Return x as (n, d) with a contiguous last axis: a view if one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def same_dtype(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the dtype of ``like``, the tensor to which it belongs."""
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def put_back(rows: Tensor, x: Tensor) -> None:
    """Copy the kernel's result in ``with_rows(x)`` back into x, if that was a copy of x."""
    if rows.data_ptr() != x.data_ptr() and not isinstance(x, Traced):
        x.copy_(rows.view(x.shape))


def listed_rows(order: Tensor, n_rows: int) -> Tensor:
    """Return row numbers as int32, as kernels read them.

    Raises IndexError on the CPU; on a GPU torch checks the numbers.
    """
    if order.is_cpu and len(order) and not is_tracing():
        low, high = (int(end) for end in order.aminmax())
        if low < 0 or high >= n_rows:
            raise IndexError(
                f"row {min(low, 0) or high} is not in the table: it has rows 0 to {n_rows - 1}. If rows are tokens, "
                "take ids of the model's own tokenizer."
            )
    return order.to(torch.int32).contiguous()
