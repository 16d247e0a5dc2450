"""Dropout in Triton: a program draws for some columns of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import dropout as reference
from veneer.ops.rows import with_rows
from veneer.ops.triton.launch import block, is_served, launch

_ROUNDS = tl.constexpr(reference.ROUNDS)
_WIDEST = 1024
_LIMITS = (1 << 31, 1 << 32)
Rows = int | Tensor


def drop(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    if not is_served(x):
        return reference.drop(x, threshold, key, rows)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run((with_rows(x), with_rows(y)), (threshold, key, rows), add=False)
    return y


def add_dropped(onto: Tensor, g: Tensor, threshold: int, key: int, rows: Rows) -> None:
    """Add ``drop(g, …)`` to ``onto`` in one pass, both (n, d) with a contiguous last axis. Other ops of this back end
    use it.
    """
    _run((g, onto), (threshold, key, rows), add=True)


def _run(tensors: tuple[Tensor, Tensor], mask: tuple[int, int, Rows], add: bool) -> None:
    source, target = tensors
    threshold, key, rows = mask
    n, d = source.shape
    size = block(d, least=reference.GROUP, most=_WIDEST)
    ids, first = (None, rows) if isinstance(rows, int) else (rows.contiguous(), 0)
    places = source, source.stride(0), target, target.stride(0), ids
    numbers = d, first, _signed(key), _signed(key >> 32), threshold
    launch(_mask_kernel, (n, triton.cdiv(d, size)), *places, *numbers, ADD=add, COUNTERS=size // 8)


def _signed(word: int) -> int:
    """Return a word as a signed number of 32 bits, since Triton chooses an argument's type by its value."""
    half, whole = _LIMITS
    return (word + half) % whole - half


# A new key or row is no reason to compile again.
@triton.jit(do_not_specialize=["first", "key_low", "key_high", "threshold"])
def _mask_kernel(
    source,
    source_stride,
    target,
    target_stride,
    ids,
    d,
    first,
    key_low,
    key_high,
    threshold,
    ADD: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    identity = row + first if ids is None else tl.load(ids + row)
    counter = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    w0, w1, w2, w3 = _words(counter, identity, key_low, key_high)
    each = tl.arange(0, 4 * COUNTERS)  # of 32 columns in each half of a group, four to a counter
    columns = tl.program_id(1) * 8 * COUNTERS + each // 32 * 64 + each % 32
    for half in tl.static_range(2):
        words = tl.join(w1, w0) if half == 0 else tl.join(w3, w2)
        draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (4 * COUNTERS,)).to(tl.int32)
        at = columns + half * 32
        inside = at < d
        values = tl.load(source + row * source_stride + at, mask=inside, other=0.0)
        places = target + row * target_stride + at
        if ADD:
            before = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            total = (before + values.to(tl.float32)).to(target.dtype.element_ty)
            tl.store(places, total, mask=inside & (draws >= threshold))
        else:
            tl.store(places, tl.where(draws < threshold, 0.0, values), mask=inside)


@triton.jit
def _words(counter, identity, key_low, key_high):
    c0 = counter.to(tl.uint32, bitcast=True)
    zero = c0 ^ c0
    c1, c2, c3 = zero + identity.to(tl.uint32), zero + (identity >> 32).to(tl.uint32), zero
    return tl.philox_impl(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32), _ROUNDS)
