"""Choice of tokens in Triton: draws exactly the tokens that the reference draws.

The numbers of all rules reach the device by one copy, and the results come back by one. Each Triton program handles one
row. It finds thresholds by bisection over the ordering of floats, so only the likeliest ids are ever sorted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import sample as reference
from veneer.ops.sample import NONE_ALLOWED, NOT_FINITE, Draws, Ints, RowRule
from veneer.ops.triton.launch import SERVED, block, launch, launch_exact

_BLOCK = 2048
_ALL = 2**31 - 1  # a top_k beyond all vocabularies
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_NEVER = tl.constexpr(-math.inf)
_NOT_FINITE, _NONE_ALLOWED = tl.constexpr(NOT_FINITE), tl.constexpr(NONE_ALLOWED)
_LOWEST = tl.constexpr(-(2**31))
_ROUNDS = tl.constexpr(1.5 * 2.0**23)  # added and subtracted, it rounds a float to the nearest whole number
_BANNED, _BIASED, _SEEN, _COUNTED = (tl.constexpr(kind) for kind in range(4))
# of a row: places and lengths of its lists among the numbers, and what is one number
_MASK, _LISTS, _TOP_K, _KEY, _PLACE, _TARGET, _SCORES = (tl.constexpr(at) for at in (0, 1, 13, 14, 16, 17, 18))
_REPETITION, _FREQUENCY, _PRESENCE, _INVERSE, _LEAST, _TOP_P = (tl.constexpr(at) for at in range(19, 25))
_N_NUMBERS = tl.constexpr(25)
_LIST = tl.constexpr(3)  # numbers of a list: where it starts, where its values do, how many there are


def likeliest(logits: Tensor) -> Tensor:
    if logits.dtype not in SERVED:
        return reference.likeliest(logits)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    found = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    launch(_likeliest_kernel, (len(rows),), rows, rows.stride(0), found, rows.shape[1], BLOCK=_block(rows))
    return found


def draw(logits: Tensor, rules: Sequence[RowRule]) -> Draws:
    n, d = logits.shape
    if not rules:
        return reference.draw(logits, rules)
    rows = logits if logits.dtype in SERVED else logits.float()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    numbers = _Numbers(d)
    table = torch.from_numpy(np.concatenate([_numbers(rule, numbers) for rule in rules]))
    sent = torch.cat([table, numbers.tensor()]).to(rows.device, non_blocking=True)  # the driver has its own copy
    table, lists = sent[: n * _N_NUMBERS.value], sent[n * _N_NUMBERS.value :].view(torch.int32)
    found = torch.zeros(5 * n, dtype=torch.int64, device=rows.device)
    work = torch.empty(n, d, dtype=torch.float32, device=rows.device)
    sizes = {"BLOCK": _block(rows)}
    grid = n, triton.cdiv(d, sizes["BLOCK"])
    launch(_copy_kernel, grid, rows, rows.stride(0), table, lists, work, d, **sizes)
    for kind, longest in enumerate(numbers.longest):
        grid = n, triton.cdiv(longest, sizes["BLOCK"])
        launch_exact(_change_kernel, grid, table, lists, work, d, KIND=kind, **sizes)
    launch_exact(_draw_kernel, (n,), table, work, found, d, **sizes, num_warps=8)
    launch_exact(_score_kernel, (n,), rows, rows.stride(0), table, found, n, d, **sizes, num_warps=8)
    return _draws(found, rows, rules)


def _block(rows: Tensor) -> int:
    return block(rows.shape[1], least=64, most=_BLOCK)


class _Numbers:
    """The ids, counts, biases and mask words of all rows' sampling rules, concatenated into one array for the GPU."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.longest = vocabulary, [0, 0, 0, 0]
        self._parts, self._n = list[np.ndarray](), 0

    def put(self, values: np.ndarray) -> int:
        """Append 32-bit numbers; return the offset of the first."""
        self._parts.append(values.view(np.int32))
        self._n += len(values)
        return self._n - len(values)

    def require(self, least: int, most: int) -> None:
        """Raise IndexError unless all ids from ``least`` to ``most`` are in the vocabulary."""
        if least < 0 or most >= self.vocabulary:
            raise IndexError(f"ids {least} to {most} are not all among the {self.vocabulary} of the logits")

    def list_of(self, kind: int, ids: Ints | None, values: array[int] | array[float] | None = None) -> tuple[int, ...]:
        """Append a list of ids, and their values if given. Return the offset of the ids, the offset of the values, and
        the number of ids.

        A missing list or missing values count as 0. Raises IndexError if an id lies beyond the vocabulary.
        """
        if not ids:
            return 0, 0, 0
        given = np.frombuffer(ids, dtype=np.int32)
        self.require(int(given.min()), int(given.max()))
        self.longest[kind] = max(self.longest[kind], len(given))
        return self.put(given), 0 if values is None else self.put(np.frombuffer(values, dtype=np.int32)), len(given)

    def tensor(self) -> Tensor:
        """Return all 32-bit numbers as a tensor of int64, two in each value."""
        parts = [*self._parts, np.zeros(self._n % 2, dtype=np.int32)]
        return torch.from_numpy(np.concatenate(parts).view(np.int64))


def _numbers(rule: RowRule, numbers: _Numbers) -> np.ndarray:
    """Return a sampling rule's row of the kernels' table, and append its lists to ``numbers``."""
    masks = [mask.numpy() for mask in rule.allowed]
    mask = numbers.put(np.bitwise_and.reduce([each[: min(map(len, masks))] for each in masks])) if masks else -1
    ids, biases = rule.biased or (None, None)
    counted, counts = rule.counted or (None, None)
    repeats = rule.repetition != 1
    numbers.require(0, rule.target or 0)
    whole = [
        mask,
        *numbers.list_of(_BANNED.value, rule.banned),
        *numbers.list_of(_BIASED.value, ids, biases),
        *numbers.list_of(_SEEN.value, rule.seen if repeats else None),
        *numbers.list_of(_COUNTED.value, counted, counts),
        min(rule.top_k, _ALL), *(_signed(key) for key in rule.key), rule.place,
        -1 if rule.target is None else rule.target,
        rule.n_likeliest is not None,
    ]  # fmt: skip
    inverse = 0.0 if rule.temperature == 0 else 1 / rule.temperature
    least = math.ceil(rule.min_p * reference.WHOLE) if rule.min_p > 0 else 0
    real = [rule.repetition, rule.frequency, rule.presence, inverse, least, rule.top_p]
    return np.concatenate([np.array(whole, dtype=np.int64), np.array(real, dtype=np.float64).view(np.int64)])


def _signed(number: int) -> int:
    """Return the lowest 64 bits of an integer as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _draws(found: Tensor, rows: Tensor, rules: Sequence[RowRule]) -> Draws:
    """Copy the kernels' results to the host, with the likeliest ids and log-probabilities of the rows whose rules
    request them.
    """
    n, d = rows.shape
    parts, counts = [found], [min(rule.n_likeliest or 0, d) for rule in rules]
    for row, count in zip(rows, counts, strict=True):
        if count:
            values, ids = row.float().sort(descending=True, stable=True)
            parts += [ids[:count], values[:count].double().view(torch.int64)]
    read = torch.cat(parts).cpu()
    tokens, ranks, sums, own, tops = torch.split(read[: 5 * n], n)
    own, tops = own.view(torch.float64), tops.view(torch.float64)
    scored = torch.tensor([rule.n_likeliest is not None for rule in rules]) & (tokens != NOT_FINITE)
    shifts = tops + (sums.clamp_min(1).double() / reference.WHOLE).log()
    logprobs = torch.where(scored & (tokens >= 0), own - shifts, 0.0)
    ids, values, at = list[Tensor](), list[Tensor](), 5 * n
    for row, (rule, count) in enumerate(zip(rules, counts, strict=True)):
        of_row, given = torch.zeros(rule.n_likeliest or 0, dtype=torch.int64), read[at : at + 2 * count]
        of_values = torch.zeros(len(of_row), dtype=torch.float64)
        if scored[row]:
            of_row[:count], of_values[:count] = given[:count], given[count:].view(torch.float64) - shifts[row]
        ids.append(of_row)
        values.append(of_values)
        at += 2 * count
    return Draws(tokens.clone(), logprobs, ranks.clone(), (torch.cat(ids), torch.cat(values)))


@triton.jit
def _real(numbers, at: tl.constexpr):
    return tl.load(numbers + at).to(tl.float64, bitcast=True)


@triton.jit
def _key(x):
    """Return an integer for each float, so that the integers have the floats' order. -0.0 and 0.0 have the same
    integer.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _share(x, top, inverse):
    """Return the whole number nearest 2^40 e^z, ties to even, where z is (x - top) / temperature."""
    z = tl.maximum((x - top) * inverse, -88.0)
    n = (z * 1.44269504 + _ROUNDS) - _ROUNDS
    r = (z - n * 0.693359375) + n * 2.12194440e-4
    p = r * 0.00138367700856179 + 0.008374898694455624
    p = p * r + 0.041668232530355453
    p = p * r + 0.16666419804096222
    p = p * r + 0.49999991059303284
    p = p * r + 1.0
    p = p * r + 1.0
    bits = p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)
    digits = (bits & 0x7FFFFF) | 0x800000
    up = ((bits >> 23) & 0xFF) - 110  # digits times two to it
    down = tl.minimum(tl.maximum(-up, 1), 31)
    cut = digits >> down
    rest, half = digits - (cut << down), 1 << (down - 1)
    cut += ((rest > half) | ((rest == half) & ((cut & 1) == 1))).to(tl.int32)
    share = tl.where(up >= 0, digits.to(tl.int64) << tl.maximum(up, 0).to(tl.int64), cut.to(tl.int64))
    return tl.where(z < -87.3, 0, share)


@triton.jit
def _from(row, d, top, inverse, least, key, BLOCK: tl.constexpr):
    """Return the number of logits whose `_key` is at least ``key``, and the sum of their shares. Logits with a share
    below ``least`` are left out.
    """
    count, mass = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for first in range(0, d, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.minimum(tl.load(row + ids, mask=ids < d, other=_NEVER), _LARGEST)
        share = _share(x, top, inverse)
        own = (ids < d) & (share >= least) & (_key(x) >= key)
        count += own.to(tl.int64)
        mass += tl.where(own, share, 0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _random_bits(key_0, key_1, place):
    """Return 53 random bits of Philox 4x64 for a key of two words and the counter ``place``: those of NumPy."""
    k0, k1 = key_0.to(tl.uint64), key_1.to(tl.uint64)
    c0 = (place + 1).to(tl.uint64)
    c1, c2, c3 = c0 * 0, c0 * 0, c0 * 0
    m0, m1 = c1 + 0xD2E7470EE14C6C93, c1 + 0xCA5A826395121157
    for _ in range(10):
        high_0, high_1 = tl.umulhi(m0, c0), tl.umulhi(m1, c2)
        low_0, low_1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + 0x9E3779B97F4A7C15, k1 + 0xBB67AE8584CAA73B
    return c0 >> 11


@triton.jit
def _kth(row, d, top, inverse, least, k, BLOCK: tl.constexpr):
    """Find the largest key that at least k logits reach; the lowest key if there are fewer logits."""
    low, high = tl.cast(_LOWEST, tl.int64), _key(top).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        count, _ = _from(row, d, top, inverse, least, middle, BLOCK)
        if count >= k:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _nucleus(row, d, top, inverse, least, key, limit, BLOCK: tl.constexpr):
    """Return the lowest key above which the sum of shares is below ``limit``, and the number of logits with this key
    that are needed to reach ``limit``.
    """
    low, high = key - 1, _key(top).to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        _, above = _from(row, d, top, inverse, least, middle + 1, BLOCK)
        if above < limit:
            high = middle
        else:
            low = middle
    _, above = _from(row, d, top, inverse, least, high + 1, BLOCK)
    bits = high.to(tl.int32)
    share = _share((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), top, inverse)
    return high, tl.cdiv(limit - above, tl.maximum(share, 1))


@triton.jit
def _first_beyond(row, d, top, inverse, least, key, n_equal, share, bits, BLOCK: tl.constexpr):
    """Return the first id at which the running sum of shares exceeds a random part of their total.

    The sum covers the ids whose logit is above ``key``, and the first ``n_equal`` ids whose logit is at ``key``.
    """
    count, mass = _from(row, d, top, inverse, least, key, BLOCK)
    fewer, above = _from(row, d, top, inverse, least, key + 1, BLOCK)
    total = tl.where(n_equal < count - fewer, above + n_equal * share, mass).to(tl.uint64)
    at = ((tl.umulhi(bits, total) << 11) | ((bits * total) >> 53)).to(tl.int64)
    sum_before, equal_before, token = at * 0, at * 0, at * 0 + d
    for first in range(0, d, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.minimum(tl.load(row + ids, mask=ids < d, other=_NEVER), _LARGEST)
        shares, keys = _share(x, top, inverse), _key(x)
        there = (ids < d) & (shares >= least)
        equal = (there & (keys == key)).to(tl.int64)
        rank = equal_before + tl.cumsum(equal, axis=0) - equal
        own = there & ((keys > key) | ((equal == 1) & (rank < n_equal)))
        shares = tl.where(own, shares, 0)
        sums = sum_before + tl.cumsum(shares, axis=0)
        token = tl.minimum(token, tl.min(tl.where((sums > at) & (ids < d), ids, d), axis=0))
        sum_before += tl.sum(shares, axis=0)
        equal_before += tl.sum(equal, axis=0)
    return token


@triton.jit
def _drawn(numbers, row, d, top, BLOCK: tl.constexpr):
    """Return the token that the rule's random number selects, of those that min_p, top_k and top_p do not exclude."""
    inverse, least = _real(numbers, _INVERSE).to(tl.float32), _real(numbers, _LEAST).to(tl.int64)
    k, top_p = tl.load(numbers + _TOP_K), _real(numbers, _TOP_P)
    key, n_equal = tl.cast(_LOWEST, tl.int64), tl.cast(d, tl.int64)
    if (k > 0) & (k < d):
        key = _kth(row, d, top, inverse, least, k, BLOCK)
    if top_p < 1:
        _, mass = _from(row, d, top, inverse, least, key, BLOCK)
        limit = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
        key, n_equal = _nucleus(row, d, top, inverse, least, key, limit, BLOCK)
    low = key.to(tl.int32)
    share = _share((low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), top, inverse)
    bits = _random_bits(tl.load(numbers + _KEY), tl.load(numbers + _KEY + 1), tl.load(numbers + _PLACE))
    return _first_beyond(row, d, top, inverse, least, key, n_equal, share, bits, BLOCK)


@triton.jit
def _largest(row, d, most, BLOCK: tl.constexpr):
    """Return a row's largest value, capped at ``most``, the index of its first occurrence, and True if any value is
    NaN.
    """
    best = tl.full([BLOCK], _NEVER, tl.float32)
    place, odd = tl.full([BLOCK], d, tl.int64), tl.zeros([BLOCK], tl.int32)
    for first in range(0, d, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < d, other=_NEVER).to(tl.float32)
        odd = odd | (x != x).to(tl.int32)
        x = tl.minimum(x, most)
        place = tl.where((x > best) & (ids < d), ids, place)
        best = tl.where(x > best, x, best)
    top = tl.max(best, axis=0)
    return top, tl.min(tl.where(best == top, place, d), axis=0), tl.max(odd, axis=0)


@triton.jit
def _likeliest_kernel(logits, stride, found, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, place, is_odd = _largest(logits + row * stride, d, float("inf"), BLOCK)
    is_finite = (top > _NEVER) & (top <= _LARGEST) & (is_odd == 0)
    tl.store(found + row, tl.where(is_finite, place, -1))


@triton.jit
def _copy_kernel(logits, stride, table, lists, work, d, BLOCK: tl.constexpr):
    """Copy the logits in float32, except those that a mask excludes."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + ids, mask=ids < d).to(tl.float32)
    mask = tl.load(table + row * _N_NUMBERS + _MASK)
    words = tl.load(lists + mask + ids // 32, mask=ids < tl.where(mask < 0, 0, d), other=-1)
    x = tl.where(((words >> (ids % 32)) & 1) == 1, x, _NEVER)
    tl.store(work + row * d + ids, x, mask=ids < d)


@triton.jit
def _change_kernel(table, lists, work, d, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Change the logits of the ids in one list of each row's rule. ``KIND`` says whether they are banned, biased or
    penalized.

    An id must be in a list only once.
    """
    row = tl.program_id(0).to(tl.int64)
    numbers = table + row * _N_NUMBERS
    own = numbers + _LISTS + KIND * _LIST
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = places < tl.load(own + 2)
    to = work + row * d + tl.load(lists + tl.load(own) + places, mask=there, other=0)
    x = tl.load(to, mask=there, other=0.0)
    values = tl.load(lists + tl.load(own + 1) + places, mask=there, other=0)
    if KIND == _BANNED:
        x = tl.full([BLOCK], _NEVER, tl.float32)
    elif KIND == _BIASED:
        x += values.to(tl.float32, bitcast=True)
    elif KIND == _SEEN:
        rate = tl.zeros([BLOCK], tl.float32) + _real(numbers, _REPETITION).to(tl.float32)
        x = tl.where(x == _NEVER, x, tl.where(x > 0, tl.div_rn(x, rate), x * rate))
    else:
        x -= _real(numbers, _FREQUENCY).to(tl.float32) * values.to(tl.float32)
        x -= _real(numbers, _PRESENCE).to(tl.float32)
    tl.store(to, x, mask=there)


@triton.jit
def _draw_kernel(table, work, found, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    numbers, logits = table + row * _N_NUMBERS, work + row * d
    token = tl.load(numbers + _TARGET)
    if token < 0:
        top, token, _ = _largest(logits, d, _LARGEST, BLOCK)
        if top == _NEVER:
            token = tl.cast(_NONE_ALLOWED, tl.int64)
        elif _real(numbers, _INVERSE) > 0:
            token = _drawn(numbers, logits, d, top, BLOCK)
    tl.store(found + row, token)


@triton.jit
def _score_kernel(logits, stride, table, found, n, d, BLOCK: tl.constexpr):
    """Store the scores of each row whose rule requests them: the token's rank, the sum of all shares, the token's
    logit, and the largest logit.

    If a logit is NaN or the largest is infinite, store `_NOT_FINITE` as the row's token.
    """
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * stride
    top, _, is_odd = _largest(own, d, float("inf"), BLOCK)
    token = tl.load(found + row)
    if (top == _NEVER) | (top > _LARGEST) | (is_odd != 0):
        tl.store(found + row, tl.cast(_NOT_FINITE, tl.int64))
    elif tl.load(table + row * _N_NUMBERS + _SCORES) != 0:
        x = tl.load(own + token, mask=token >= 0, other=0.0).to(tl.float32)
        rank, mass = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for first in range(0, d, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            each = tl.load(own + ids, mask=ids < d, other=_NEVER).to(tl.float32)
            rank += ((each >= x) & (ids < d)).to(tl.int64)
            mass += tl.where(ids < d, _share(each, top, 1.0), 0)
        tl.store(found + n + row, tl.where(token >= 0, tl.sum(rank, axis=0), 0))
        tl.store(found + 2 * n + row, tl.sum(mass, axis=0))
        tl.store(found + 3 * n + row, x.to(tl.float64).to(tl.int64, bitcast=True))
        tl.store(found + 4 * n + row, top.to(tl.float64).to(tl.int64, bitcast=True))
