"""ggml's searches for scales and levels, in plain torch: many groups of values at once, sums in ggml's own order.

``x`` and ``w`` are ``(groups, n)`` float32, a group's values and their weights; levels are int32 of the same shape.
Sums run strictly from the first value to the last, each product and sum rounded to float32: the bytes depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

SMALLEST = 1e-15  # of a group's largest magnitude; below it the group counts as zeros
MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number
MAX_PASSES = 5

Values = Float32[Tensor, "groups n"]
Levels = Int32[Tensor, "groups n"]
PerGroup = Float32[Tensor, " groups"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Reciprocal scales that the affine search tries: ``(first + delta * step + n_max) / (max - min)``."""

    n_max: int
    first: float
    delta: float
    n_steps: int
    absolute: bool = False  # errors count by magnitude instead of their square


def nint(v: Tensor) -> Tensor:
    """Return the nearest whole number, ties to even; beyond ±4194303 it wraps, as ggml's does."""
    return ((v + MAGIC).view(torch.int32) & 0x7FFFFF) - 0x400000


def ordered_sum(terms: Float32[Tensor, "groups n"]) -> PerGroup:
    total = torch.zeros_like(terms[:, 0])
    for term in terms.unbind(1):
        total = total + term
    return total


def signed_largest(x: Values) -> PerGroup:
    """Return the first value of largest magnitude in each group; NaN counts as 0, and zeros give 0, never -0."""
    known = torch.where(x.isnan(), torch.zeros_like(x), x)
    return known.gather(1, known.abs().argmax(dim=1, keepdim=True))[:, 0] + 0.0


def smallest(x: Values) -> PerGroup:
    """Return the first of the smallest values of each group.

    The first counts because -0 and 0 are equal, but their bytes in float16 differ.
    """
    return x.gather(1, x.argmin(dim=1, keepdim=True))[:, 0]


def at_least_zero(v: Tensor) -> Tensor:
    """Return the values, with 0 for negative values, -0 and NaN."""
    return torch.where(v > 0, v, torch.zeros_like(v))


def quotient(a: float, b: Tensor) -> Tensor:
    """Return ``a / b`` rounded once: torch would multiply a number by the reciprocal, which rounds twice."""
    return torch.full_like(b, a) / b


def root(v: Tensor) -> Tensor:
    """Return the correctly rounded square root; torch's own in float32 is not correctly rounded."""
    return v.double().sqrt().float()


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``, or 0 if b is not positive."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


def affine(x: Values, w: Values, grid: Grid) -> tuple[PerGroup, PerGroup, Levels]:
    """Return scale s, minimum m (at least 0) and levels L of ``x ≈ s L - m``, by grid search and least squares."""
    low, high = smallest(x), x.amax(dim=1)
    low = torch.where(low > 0, torch.zeros_like(low), low)
    sum_w, sum_x = ordered_sum(w), ordered_sum(w * x)
    flat = high <= low
    inverse = quotient(grid.n_max, high - low)
    scale, levels = quotient(1, inverse), _levels(x, low, inverse, grid)
    least = _error(x, w, levels, scale, low, grid)
    for step in range(grid.n_steps + 1):
        start = _float32(_float32(grid.first) + _float32(_float32(grid.delta) * step))
        inverse = quotient(_float32(start + grid.n_max), high - low)
        tried = _levels(x, low, inverse, grid)
        new_scale, new_low, determinant = _fit(x, w, tried, (sum_w, sum_x))
        error = _error(x, w, tried, new_scale, new_low, grid)
        better = (determinant > 0) & (error < least)
        least, scale, low = (
            torch.where(better, new, old) for new, old in ((error, least), (new_scale, scale), (new_low, low))
        )
        levels = torch.where(better[:, None], tried, levels)
    return torch.where(flat, torch.zeros_like(scale), scale), -low, levels * ~flat[:, None]


def symmetric(x: Values, w: Values, n_max: int) -> tuple[PerGroup, Levels]:
    """Return scale s and levels L (0 … 2 n_max - 1) of ``x ≈ s (L - n_max)``.

    The search tries scales around n_max / largest magnitude.
    """
    largest = signed_largest(x)
    wx = w * x

    def tried(numerator: float) -> tuple[Levels, PerGroup, PerGroup]:
        levels = nint(quotient(numerator, largest)[:, None] * x).clamp(-n_max, n_max - 1)
        return levels, *_sums(wx, w, levels)

    levels, sum_lx, sum_l2 = tried(-n_max)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, torch.zeros_like(sum_lx))
    best = scale * sum_lx
    for k in (*range(-9, 0), *range(1, 10)):
        new, sum_lx, sum_l2 = tried(-_float32(n_max + _float32(_float32(0.1) * k)))
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        levels = torch.where(better[:, None], new, levels)
    zero = largest.abs() < SMALLEST
    return torch.where(zero, torch.zeros_like(scale), scale), (levels + n_max) * ~zero[:, None]


def descent(x: Values, n_max: int) -> tuple[PerGroup, Levels]:
    """Return scale and levels as `symmetric` does with weights x², by coordinate descent over the levels."""
    largest = signed_largest(x)
    levels = nint(quotient(-n_max, largest)[:, None] * x).clamp(-n_max, n_max - 1)
    scale, levels = _descend(x, x * x, levels, (-n_max, n_max - 1))
    zero = largest.abs() < SMALLEST
    return torch.where(zero, torch.zeros_like(scale), scale), (levels + n_max) * ~zero[:, None]


def positive(x: Values, w: Values, n_max: int) -> tuple[PerGroup, Levels]:
    """Return scale s and levels L (0 … n_max) of ``x ≈ s L``, for x without negative values.

    It is used for the scales and the minima of groups, which are quantized again.
    """
    largest = at_least_zero(x.amax(dim=1))
    inverse = quotient(n_max, largest)
    least = _squares(x, w, _byte(nint(inverse[:, None] * x)), quotient(1, inverse))
    for k in (*range(-4, 0), *range(1, 5)):
        tried = quotient(_float32(_float32(_float32(0.1) * k) + n_max), largest)
        error = _squares(x, w, nint(tried[:, None] * x).clamp(max=n_max), quotient(1, tried))
        better = error < least
        least, inverse = torch.where(better, error, least), torch.where(better, tried, inverse)
    levels = nint(inverse[:, None] * x).clamp(max=n_max)
    scale, levels = _descend(x, w, levels, (None, n_max))
    zero = largest < SMALLEST
    return torch.where(zero, torch.zeros_like(scale), scale), levels * ~zero[:, None]


def _descend(x: Values, w: Values, levels: Levels, bounds: tuple[int | None, int]) -> tuple[PerGroup, Levels]:
    """Improve the levels by coordinate descent, one level at a time, in up to five passes.

    Return the least-squares scale of each group, and its levels. If the lower of ``bounds`` is None, each level is
    reduced to a byte.
    """
    wx = w * x
    sum_lx, sum_l2 = _sums(wx, w, levels)
    kept = list((levels if bounds[0] is not None else _byte(levels)).unbind(1))
    for _ in range(MAX_PASSES):
        changed = False
        for i, old in enumerate(kept):
            rest_lx, rest_l2 = sum_lx - wx[:, i] * old, sum_l2 - (w[:, i] * old) * old
            new = nint((x[:, i] * rest_l2) / rest_lx).clamp(*bounds)
            new_lx, new_l2 = rest_lx + wx[:, i] * new, rest_l2 + (w[:, i] * new) * new
            allowed = (rest_lx > 0) & (new_l2 > 0 if bounds[0] is not None else rest_l2 > 0)
            better = allowed & (new != old) & ((new_lx * new_lx) * sum_l2 > (sum_lx * sum_lx) * new_l2)
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
            kept[i] = torch.where(better, new if bounds[0] is not None else _byte(new), old)
            changed |= bool(better.any())
        if not changed:
            break
    return ratio(sum_lx, sum_l2), torch.stack(kept, dim=1)


def _levels(x: Values, low: PerGroup, inverse: PerGroup, grid: Grid) -> Levels:
    return nint(inverse[:, None] * (x - low[:, None])).clamp(0, grid.n_max)


def _error(x: Values, w: Values, levels: Levels, scale: PerGroup, low: PerGroup, grid: Grid) -> PerGroup:
    off = scale[:, None] * levels + low[:, None] - x
    return ordered_sum(w * (off.abs() if grid.absolute else off * off))


def _fit(x: Values, w: Values, levels: Levels, sums: tuple[PerGroup, PerGroup]) -> tuple[PerGroup, PerGroup, PerGroup]:
    """Fit scale and minimum (at most 0) by least squares. Return both, and the determinant of their equations."""
    sum_w, sum_x = sums
    wl = w * levels
    sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * levels), ordered_sum(wl * x)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    above = low > 0
    return torch.where(above, sum_xl / sum_l2, scale), torch.where(above, torch.zeros_like(low), low), determinant


def _sums(wx: Values, w: Values, levels: Levels) -> tuple[PerGroup, PerGroup]:
    return ordered_sum(wx * levels), ordered_sum((w * levels) * levels)


def _squares(x: Values, w: Values, levels: Levels, scale: PerGroup) -> PerGroup:
    off = x - scale[:, None] * levels
    return ordered_sum((w * off) * off)


def _byte(levels: Tensor) -> Tensor:
    return levels & 255


def _float32(v: float) -> float:
    """Round a number to float32, so that Python's arithmetic equals C's in floats."""
    return torch.tensor(v, dtype=torch.float32).item()
