"""Dropout in Triton: a program draws the masks of up to four layers for some columns of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.dropout import Mask
from veneer.ops.reference import dropout as reference
from veneer.ops.rows import with_rows
from veneer.ops.triton.launch import block, is_served, launch

_ROUNDS = tl.constexpr(reference.ROUNDS)
_WIDEST = 1024
_LIMITS = (1 << 31, 1 << 32)
_MOST_MASKS = 4  # of a launch
_DRAWN = [f"{word}_{k}" for k in range(_MOST_MASKS) for word in ("threshold", "low", "high")]
Rows = int | Tensor
Drawn = tuple[int, int]
"""Threshold and key of a mask."""


def drop(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    if not is_served(x):
        return reference.drop(x, threshold, key, rows)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(with_rows(x)[None], with_rows(y)[None], [(threshold, key)], rows)
    return y


def add_dropped(onto: Tensor, g: Tensor, threshold: int, key: int, rows: Rows) -> None:
    """Add ``drop(g, …)`` to ``onto`` in one pass, both (n, d) with a contiguous last axis. Other ops of this back end
    use it.
    """
    _run(g[None], onto, [(threshold, key)], rows, add=True)


def drop_each(x: Tensor, masks: Sequence[Mask]) -> Tensor:
    """Return x (n, d) dropped by each of k masks, as (k, n, d). A launch reads x once for up to four masks."""
    y = torch.empty(len(masks), *x.shape, dtype=x.dtype, device=x.device)
    for part, drawn, ids in _launches(masks):
        _run(x[None], y[part], drawn, ids)
    return y


def kept_sum(parts: Tensor, masks: Sequence[Mask]) -> Tensor:
    """Return the sum of (k, n, d), each part dropped by its mask: the gradient of `drop_each` in x.

    A launch sums up to four parts in float32, and rounds once.
    """
    total = torch.empty_like(parts[0])
    for part, drawn, ids in _launches(masks):
        _run(parts[part], total, drawn, ids, add=part.start > 0)
    return total


def _launches(masks: Sequence[Mask]) -> Iterator[tuple[slice, list[Drawn], Tensor]]:
    """Yield the masks of each launch: they have the same ids, which a step's layers share."""
    first = 0
    while first < len(masks):
        ids = masks[first].ids
        own = list(takewhile(lambda mask: mask.ids is ids, masks[first : first + _MOST_MASKS]))  # noqa: B023
        yield slice(first, first + len(own)), [(mask.threshold, mask.key) for mask in own], ids
        first += len(own)


def _run(source: Tensor, target: Tensor, masks: Sequence[Drawn], rows: Rows, add: bool = False) -> None:
    """Drop parts (k or 1, n, d) of the source into those of the target; or into their sum, if the target is (n, d).

    With ``add``, the sum is added to what is there.
    """
    n, d = source.shape[1:]
    size = block(d, least=reference.GROUP, most=_WIDEST)
    ids, first = (None, rows) if isinstance(rows, int) else (rows.contiguous(), 0)
    sums = target.dim() == 2
    apart = (0 if len(source) == 1 else source.stride(0)), (0 if sums else target.stride(0))
    places = source, source.stride(1), target, target.stride(-2), *apart, ids
    padded = [*masks, *[(0, 0)] * (_MOST_MASKS - len(masks))]
    drawn = [word for threshold, key in padded for word in (threshold, _signed(key), _signed(key >> 32))]
    forms = {"MASKS": len(masks), "SUMS": sums, "ADD": add, "COUNTERS": size // 8}
    launch(_masks_kernel, (n, triton.cdiv(d, size)), *places, d, first, *drawn, **forms)


def _signed(word: int) -> int:
    """Return a word as a signed number of 32 bits, since Triton chooses an argument's type by its value."""
    half, whole = _LIMITS
    return (word + half) % whole - half


# A new key or row is no reason to compile again.
@triton.jit(do_not_specialize=["source_part", "target_part", "first", *_DRAWN])
def _masks_kernel(
    source,
    source_row,
    target,
    target_row,
    source_part,
    target_part,
    ids,
    d,
    first,
    threshold_0,
    low_0,
    high_0,
    threshold_1,
    low_1,
    high_1,
    threshold_2,
    low_2,
    high_2,
    threshold_3,
    low_3,
    high_3,
    MASKS: tl.constexpr,
    SUMS: tl.constexpr,
    ADD: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    identity = row + first if ids is None else tl.load(ids + row)
    counter = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    each = tl.arange(0, 4 * COUNTERS)  # of 32 columns in each half of a group, four to a counter
    columns = tl.program_id(1) * 8 * COUNTERS + each // 32 * 64 + each % 32
    later = columns + 32
    into = target + row * target_row
    if SUMS:
        total = tl.zeros([4 * COUNTERS], tl.float32)
        later_total = tl.zeros([4 * COUNTERS], tl.float32)
        if ADD:
            total += tl.load(into + columns, mask=columns < d, other=0.0).to(tl.float32)
            later_total += tl.load(into + later, mask=later < d, other=0.0).to(tl.float32)
    for k in tl.static_range(MASKS):
        if k == 0:
            threshold, low, high = threshold_0, low_0, high_0
        elif k == 1:
            threshold, low, high = threshold_1, low_1, high_1
        elif k == 2:
            threshold, low, high = threshold_2, low_2, high_2
        else:
            threshold, low, high = threshold_3, low_3, high_3
        w0, w1, w2, w3 = _words(counter, identity, low, high)
        start = source + tl.cast(source_part, tl.int64) * k + row * source_row
        values = _kept(start, columns, d, w1, w0, threshold, COUNTERS)
        later_values = _kept(start, later, d, w3, w2, threshold, COUNTERS)
        if SUMS:
            total += values.to(tl.float32)
            later_total += later_values.to(tl.float32)
        else:
            place = into + tl.cast(target_part, tl.int64) * k
            tl.store(place + columns, values, mask=columns < d)
            tl.store(place + later, later_values, mask=later < d)
    if SUMS:
        tl.store(into + columns, total.to(target.dtype.element_ty), mask=columns < d)
        tl.store(into + later, later_total.to(target.dtype.element_ty), mask=later < d)


@triton.jit
def _kept(start, columns, d, low_words, high_words, threshold, COUNTERS: tl.constexpr):
    words = tl.join(low_words, high_words)
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (4 * COUNTERS,)).to(tl.int32)
    values = tl.load(start + columns, mask=columns < d, other=0.0)
    return tl.where(draws < threshold, 0.0, values)


@triton.jit
def _words(counter, identity, key_low, key_high):
    c0 = counter.to(tl.uint32, bitcast=True)
    zero = c0 ^ c0
    c1, c2, c3 = zero + identity.to(tl.uint32), zero + (identity >> 32).to(tl.uint32), zero
    return tl.philox_impl(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32), _ROUNDS)
