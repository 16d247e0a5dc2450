"""Dropout's masks in plain torch: the specification.

The generator is Philox4x32 of seven rounds, the fewest that pass BigCrush, and a third faster than ten (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3). A 64-bit key and a counter of four words give four
words of 32 bits, eight draws of 16 bits.

Columns are in groups of 64. A group takes eight counters (j, row id's low word, row id's high word, 0), j counting
through the row. Their words pair into two 64-bit numbers, word 0 above word 1 and word 2 above word 3. Each number is
four draws, from the lowest bits up.

The first numbers of the eight counters, one after another, are the draws of the group's first 32 columns. The second
numbers are those of its last 32. Vector products leave them in this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
GROUP = 64
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Rows = int | Tensor


def drop(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    return torch.where(_is_dropped(x, threshold, key, rows), 0, x)


def draws(n_columns: int, key: int, rows: Tensor) -> Tensor:
    """Return the 16-bit random numbers of the rows whose ids are ``rows`` (n,), as int64 (n, n_columns)."""
    groups = -(-n_columns // GROUP)
    counter = torch.arange(8 * groups, device=rows.device)
    row = rows[:, None]
    first, second, third, fourth = philox((counter, row & _WORD, row >> 32 & _WORD, torch.zeros_like(row)), key)
    words = torch.stack([second, first, fourth, third], dim=-1)  # from the lowest bits up
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # (n, 8 groups, 4, 2)
    numbers = halves.view(len(rows), groups, 8, 2, 4)
    return numbers.transpose(2, 3).reshape(len(rows), groups * GROUP)[:, :n_columns]


def philox(counter: Words, key: int, rounds: int = ROUNDS) -> Words:
    """Return Philox4x32 of counters whose words are int64 tensors that broadcast, each below 2^32."""
    first, second, third, fourth = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    low, high = key & _WORD, key >> 32
    for _ in range(rounds):
        a, b = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]  # of 64 bits; the sign is one of them
        first, second = b >> 32 & _WORD ^ second ^ low, b & _WORD
        third, fourth = a >> 32 & _WORD ^ fourth ^ high, a & _WORD
        low, high = low + _KEY_STEPS[0] & _WORD, high + _KEY_STEPS[1] & _WORD
    return first, second, third, fourth


def _is_dropped(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    n_rows = x.shape[:-1].numel()
    ids = torch.arange(rows, rows + n_rows, device=x.device) if isinstance(rows, int) else rows.flatten()
    return (draws(x.shape[-1], key, ids) < threshold).view(x.shape)
