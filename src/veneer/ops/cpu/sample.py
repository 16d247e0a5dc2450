"""Choice of tokens by csrc/sample, from float32 and bfloat16."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.packed import ROWS
from veneer.ops.reference import sample as reference
from veneer.ops.sample import Draws, Floats, Ints, RowRule

_ALL = 2**31 - 1  # a top_k beyond all vocabularies


def likeliest(logits: Tensor) -> Tensor:
    if logits.dtype not in ROWS:
        return reference.likeliest(logits)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    n, d = rows.shape
    values, places = torch.full((n,), -torch.inf), torch.full((n,), -1)
    kernels().sample_likeliest(
        n, d, DTYPES[rows.dtype], address(rows), rows.stride(0), address(values), address(places)
    )
    places[values == torch.inf] = -1
    return places


def draw(logits: Tensor, rules: Sequence[RowRule]) -> Draws:
    if not rules:
        return reference.draw(logits, rules)
    rows = logits if logits.dtype in ROWS else logits.float()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    numbers, reals, n = array("q"), array("d"), len(rules)
    for rule in rules:
        numbers.extend(_numbers(rule))
        reals.extend((rule.repetition, rule.frequency, rule.presence, rule.temperature, rule.min_p, rule.top_p))
    asked = sum(rule.n_likeliest or 0 for rule in rules)
    whole, real = torch.zeros(2 * n + asked, dtype=torch.int64), torch.zeros(n + asked, dtype=torch.float64)
    tokens, ranks, ids = torch.split(whole, [n, n, asked])
    logprobs, likeliest_logprobs = torch.split(real, [n, asked])
    kernels().sample_draw(
        n, rows.shape[1], DTYPES[rows.dtype], address(rows), rows.stride(0), _at(numbers), _at(reals),
        address(tokens), address(logprobs), address(ranks), address(ids), address(likeliest_logprobs),
    )  # fmt: skip
    return Draws(tokens, logprobs, ranks, (ids, likeliest_logprobs))


def _numbers(rule: RowRule) -> tuple[int, ...]:
    """Return the integers and addresses of a sampling rule, ordered as csrc/sample/bindings.cpp reads them."""
    first, second = (*map(address, rule.allowed), 0, 0)[:2]
    biased, biases = rule.biased or (None, None)
    counted, counts = rule.counted or (None, None)
    return (
        first, second, *_list(rule.banned), _at(biased), *_list(biases), *_list(rule.seen), _at(counted),
        *_list(counts), min(rule.top_k, _ALL), _signed(rule.key[0]), _signed(rule.key[1]), rule.place,
        -1 if rule.target is None else rule.target, -1 if rule.n_likeliest is None else rule.n_likeliest,
    )  # fmt: skip


def _at(values: Ints | Floats | None) -> int:
    return 0 if values is None else values.buffer_info()[0]


def _list(values: Ints | Floats | None) -> tuple[int, int]:
    return (0, 0) if values is None else values.buffer_info()


def _signed(number: int) -> int:
    """Return the lowest 64 bits of an integer as a signed number, as C reads them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
