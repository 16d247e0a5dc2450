"""Dropout (Srivastava et al. 2014) whose masks are functions of a key, the row's id and the column; no mask is stored.

Forward, backward and a recomputed forward draw the same mask. A row's draws do not depend on the batch, the back end
or the number of threads. Values are kept or dropped, never scaled: fold `keep_scale` into a factor that is applied
anyway. ``reference/dropout.py`` describes the draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation

_DRAWS = 1 << 16
Rows = int | Int64[Tensor, "*batch"]


@dataclass(frozen=True, slots=True)
class Mask:
    """Mask that drops values of x (n, i) with probability ``p``, as a function of ``key``, row id and column alone.

    ``ids`` holds the id of each of the n rows, even of rows to which the mask is not applied.
    """

    p: float
    key: int
    ids: Int64[Tensor, " n"]

    @property
    def scale(self) -> float:
        """Factor of the kept values: `keep_scale`."""
        return keep_scale(self.p)

    @property
    def threshold(self) -> int:
        """Threshold of the 16-bit draws: smaller draws drop. Raises ConfigError if p is outside [0, 1]."""
        return _threshold(self.p)

    def drop(
        self, x: Float[Tensor, "m i"], rows: slice = slice(None), *, backend: str | None = None
    ) -> Float[Tensor, "m i"]:
        """Return the given rows of x with values dropped by `drop`."""
        return drop(x, self.p, self.key, self.ids[rows], backend=backend)


def keep_scale(p: float) -> float:
    """Return ``1 / (1 - p)``, the scale of kept values; 0 if p is 1.

    p is rounded to the probability that is drawn, a whole number of 65536ths. Raises ConfigError if p is outside [0,
    1].
    """
    kept = _DRAWS - _threshold(p)
    return _DRAWS / kept if kept else 0.0


def drop(
    x: Float[Tensor, "*batch i"], p: float, key: int, rows: Rows = 0, *, backend: str | None = None
) -> Float[Tensor, "*batch i"]:
    """Return a copy of x in which each element is 0 with probability p, rounded to a 65536th. The others are unchanged.

    key: any unsigned 64-bit number; each dropout of each step needs a key of its own. rows: the id of each row of x,
    (*batch) of int64, or the first row's id if ids are consecutive. A dropped NaN or infinity is 0 too. Unlike in the
    paper, kept values are not scaled by ``1 / (1 - p)``. Raises ConfigError if p or key is out of range, ShapeError if
    rows does not fit x.
    """
    threshold = _threshold(p)
    require_fit(x, key, rows)
    if threshold == _DRAWS or not x.numel():
        return torch.zeros_like(x)
    y: Tensor = implementation("dropout.drop", x.device, backend)(x, threshold, key, rows)
    return y


def dropout(x: Float[Tensor, "*batch i"], mask: Mask) -> Float[Tensor, "*batch i"]:
    """Return x after dropout under autograd, kept values scaled up. The backward pass draws the mask again."""
    y: Tensor = _Dropout.apply(x.reshape(-1, x.shape[-1]), mask)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return mask.drop(x).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return dropout(grads[0], ctx.mask), None


def _threshold(p: float) -> int:
    """Return p as a threshold from 0 to 65536: a 16-bit random number below it drops its value. Raises ConfigError if p
    is outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ConfigError(f"the probability of dropout is between 0 and 1; given {p}")
    return round(p * _DRAWS)


def require_fit(x: Tensor, key: int, rows: Rows) -> None:
    """Raise ConfigError if a key or the first row's id is out of range, ShapeError if ids do not fit x."""
    if not 0 <= key < 1 << 64:
        raise ConfigError(f"the key of a mask is a whole number from 0 to 2^64 - 1; given {key}")
    if isinstance(rows, int):
        n_rows = x.shape[:-1].numel()
        if not 0 <= rows < (1 << 63) - n_rows:
            raise ConfigError(f"ids of rows are whole numbers from 0 to 2^63 - 1; given {n_rows} from {rows} on")
    elif rows.shape != x.shape[:-1] or rows.dtype != torch.int64 or rows.device != x.device:
        raise ShapeError(
            f"x is {tuple(x.shape)} on {x.device}, so rows must be {tuple(x.shape[:-1])} of int64 there; given "
            f"{tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )
