"""Gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

ALONG: dict[str, Any] = {"fast_mode": True, "atol": 1e-10, "rtol": 1e-7}
"""Differences along random directions: two calls in place of two for each entry.

A wrong entry is a small part of such a difference. The limits are so close that one of 700 shows if it is off by 0.1%.
"""


def has_exact_gradients(function: Callable[..., Any], given: Sequence[Tensor], *, twice: bool = False) -> bool:
    """Return True if the gradients of a function in float64 are right, and with ``twice`` also theirs; raise else."""
    return gradcheck(function, tuple(given), **ALONG) and (not twice or gradgradcheck(function, tuple(given), **ALONG))
