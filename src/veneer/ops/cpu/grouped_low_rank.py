"""Grouped low-rank product by csrc/grouped_low_rank, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import AdapterRuns, Factors, LowRankGroup
from veneer.ops.memory import address
from veneer.ops.reference import grouped_low_rank as reference
from veneer.ops.rows import same_dtype, with_rows


def forward(x: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, ys: Sequence[Tensor]) -> Tensor:
    factors = _factors(groups)
    one_dtype = _one_dtype(factors)
    if not is_served(x, *ys, *one_dtype) or len(one_dtype) != 1 or not _in_rows(ys) or not _ids_lie_together(groups):
        return reference.forward(x, groups, rows, ys)
    x = with_rows(x)
    given = _given(x, groups, factors, rows, ys)
    u = torch.empty(kernels().grouped_low_rank_u_bytes(*given), dtype=torch.uint8)
    kernels().grouped_low_rank_forward(*given, address(x), x.stride(0), _places(ys), address(u))
    return u


def backward(
    dys: Sequence[Tensor], x: Tensor, u: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, input_grad: bool
) -> tuple[Tensor | None, list[Factors], list[Factors]]:
    if u.dtype != torch.uint8:
        return reference.backward(dys, x, u, groups, rows, input_grad)
    x, dys = with_rows(x), [with_rows(same_dtype(dy, x)) for dy in dys]
    factors = _factors(groups)
    fresh = torch.empty if _reach_all(groups, rows) else torch.zeros
    dx = fresh(x.shape, dtype=x.dtype) if input_grad else None
    found = [_fresh(side) for group in groups for side in (group.a, group.b)]
    grads = _pairwise(found)
    kernels().grouped_low_rank_backward(
        *_given(x, groups, factors, rows, dys),
        address(x),
        x.stride(0),
        _places(dys),
        address(u),
        0 if dx is None else address(dx),
        [0 if g is None else address(g) for g in grads],
    )
    return dx, found[0::2], found[1::2]


def _factors(groups: Sequence[LowRankGroup]) -> list[Tensor | None]:
    """Return the factors a and b of every adapter on every layer, each contiguous."""
    return _pairwise([_contiguous(side) for group in groups for side in (group.a, group.b)])


def _pairwise(factors: Sequence[Factors]) -> list[Tensor | None]:
    """Return the factors a and b of every adapter in turn, given all a and all b of each layer."""
    each = [side.unbind() if isinstance(side, Tensor) else side for side in factors]
    return [f for a, b in zip(each[0::2], each[1::2], strict=True) for pair in zip(a, b, strict=True) for f in pair]


def _contiguous(side: Factors) -> Factors:
    if isinstance(side, Tensor):
        return side.flatten(1).contiguous().view(side.shape)  # of two axes torch copies in tiles: PEFT's B is turned
    return tuple(None if f is None else f.contiguous() for f in side)


def _fresh(side: Factors) -> Factors:
    if isinstance(side, Tensor):
        return torch.empty(side.shape, dtype=torch.float32)
    return tuple(None if f is None else torch.empty(f.shape, dtype=torch.float32) for f in side)


def _reach_all(groups: Sequence[LowRankGroup], rows: AdapterRuns) -> bool:
    """Return True if every row has an adapter with a pair on at least one of the layers."""
    if any(isinstance(group.a, Tensor) for group in groups):
        return sum(stop - start for _, start, stop in rows.runs) == rows.n_rows
    reached = [any(group.a[k] is not None for group in groups) for k in range(len(groups[0].a))]
    return sum(stop - start for k, start, stop in rows.runs if reached[k]) == rows.n_rows


def _one_dtype(factors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return one of the factors for each dtype that occurs among them."""
    return list({f.dtype: f for f in factors if f is not None}.values())


def _in_rows(ys: Sequence[Tensor]) -> bool:
    """Return True if the kernel can write the outputs: all have the same dtype and a contiguous last axis."""
    return all(y.stride(1) == 1 and y.dtype == ys[0].dtype for y in ys)


def _ids_lie_together(groups: Sequence[LowRankGroup]) -> bool:
    """Return True if the row ids of every dropout mask are contiguous in memory."""
    return all(mask.ids.is_contiguous() for group in groups for mask in group.masks if mask is not None)


def _given(
    x: Tensor, groups: Sequence[LowRankGroup], factors: Sequence[Tensor | None], rows: AdapterRuns, ys: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Return the fields of the struct ``Given`` in csrc/grouped_low_rank/bindings.cpp."""
    dtype = next((f.dtype for f in factors if f is not None), x.dtype)
    pairs: list[int] = []
    for a, b in zip(factors[0::2], factors[1::2], strict=True):
        pairs += (0, 0, 0) if a is None or b is None else (address(a), address(b), a.shape[0])
    return (
        [DTYPES[x.dtype], DTYPES[dtype], DTYPES[ys[0].dtype]],
        x.shape[1],
        [y.shape[1] for y in ys],
        pairs,
        [number for group in groups for k in range(len(group.scales)) for number in _mask(group.mask_of(k))],
        [scale for group in groups for scale in group.scales],
        [number for run in sorted(rows.runs) for number in run],
    )


def _mask(mask: Mask | None) -> tuple[int, int, int]:
    """Return a dropout mask in the kernel's form: the random key as a signed 64-bit number, the threshold, and the
    address of the ids.

    All are 0 without a mask; a threshold of 0 drops nothing.
    """
    if mask is None:
        return 0, 0, 0
    return mask.key - (mask.key >> 63 << 64), mask.threshold, address(mask.ids)


def _places(ys: Sequence[Tensor]) -> list[int]:
    """Return each tensor's address and the distance between its rows."""
    return [number for y in ys for number in (address(y), y.stride(0))]
