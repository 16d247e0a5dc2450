"""Choice of tokens, in plain torch.

The share of an id is the whole number nearest 2^40 e^z, where z is its distance from the largest logit over the
temperature. Sums of shares are whole numbers, so that no order of summation, block or thread changes a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from veneer.ops.sample import NONE_ALLOWED, NOT_FINITE, WORD, Draws, Ints, RowRule

NEVER = -math.inf
WHOLE = 2.0**40
_LARGEST = torch.finfo(torch.float32).max
_POLYNOMIAL = (
    0.00138367700856179, 0.008374898694455624, 0.041668232530355453, 0.16666419804096222, 0.49999991059303284, 1.0, 1.0,
)  # fmt: skip


def likeliest(logits: Tensor) -> Tensor:
    best = logits.max(dim=-1)
    first = (logits == best.values[:, None]).int().argmax(dim=-1)
    return torch.where(torch.isfinite(best.values), first, -1)


def draw(logits: Tensor, rules: Sequence[RowRule]) -> Draws:
    rows = [_row(row.float(), rule) for row, rule in zip(logits, rules, strict=True)]
    tokens, logprobs, ranks, ids, values = zip(*rows, strict=True) if rows else ((),) * 5
    return Draws(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(logprobs, dtype=torch.float64),
        torch.tensor(ranks, dtype=torch.int64),
        (torch.cat([torch.empty(0, dtype=torch.int64), *ids]), torch.cat([torch.empty(0).double(), *values])),
    )


def _row(logits: Tensor, rule: RowRule) -> tuple[int, float, int, Tensor, Tensor]:
    """Return token, log-probability and rank for one row, then ids and log-probabilities of its likeliest tokens."""
    n = rule.n_likeliest or 0
    ids, logprobs = torch.zeros(n, dtype=torch.int64), torch.zeros(n).double()
    if not math.isfinite(float(logits.max())):
        return NOT_FINITE, 0.0, 0, ids, logprobs
    token = _token(logits, rule) if rule.target is None else rule.target
    if rule.n_likeliest is None:
        return token, 0.0, 0, ids, logprobs
    order = logits.sort(descending=True, stable=True).indices[:n]
    own = logprobs_of(logits)
    ids[: len(order)], logprobs[: len(order)] = order.cpu(), own[order].cpu()
    if token < 0:
        return token, 0.0, 0, ids, logprobs
    return token, float(own[token]), int((logits >= logits[token]).sum()), ids, logprobs


def _token(logits: Tensor, rule: RowRule) -> int:
    logits = changed(logits, rule)
    if float(logits.max()) == NEVER:
        return NONE_ALLOWED
    if rule.temperature == 0:
        return int(likeliest(logits[None]))
    sums = narrowed(logits, rule).cumsum(dim=0)
    at = random_bits(rule.key, rule.place) * int(sums[-1]) >> 53
    return int(torch.searchsorted(sums, at, right=True))


def changed(logits: Tensor, rule: RowRule) -> Tensor:
    """Return a copy of the logits after masks, bans, biases and penalties, limited to the largest finite float."""
    logits = logits.clone()
    for mask in rule.allowed:
        logits[~allowed(mask, len(logits)).to(logits.device)] = NEVER
    if rule.banned is not None:
        logits[_ids(rule.banned)] = NEVER
    if rule.biased is not None:
        ids, biases = rule.biased
        logits[_ids(ids)] += torch.tensor(biases, device=logits.device)
    if rule.seen is not None and rule.repetition != 1:
        there = logits[_ids(rule.seen)]
        rate = torch.tensor(rule.repetition, dtype=torch.float32)
        repeated = torch.where(there > 0, there / rate, there * rate)
        logits[_ids(rule.seen)] = torch.where(there == NEVER, there, repeated)
    if rule.counted is not None:
        ids, counts = rule.counted
        n = torch.tensor(counts, device=logits.device).float()
        logits[_ids(ids)] = logits[_ids(ids)] - rule.frequency * n - rule.presence
    return logits.clamp_max(_LARGEST)


def narrowed(logits: Tensor, rule: RowRule) -> Tensor:
    """Return each id's share of probability as a whole number; 0 for ids that min_p, top_k or top_p exclude."""
    shares = shares_of((logits - logits.max()) * torch.tensor(1 / rule.temperature, dtype=torch.float32))
    if rule.min_p > 0:
        excluded = shares < math.ceil(rule.min_p * WHOLE)
        logits, shares = logits.masked_fill(excluded, NEVER), shares.masked_fill(excluded, 0)
    if 0 < rule.top_k < len(logits):
        excluded = logits < logits.topk(rule.top_k).values[-1]
        logits, shares = logits.masked_fill(excluded, NEVER), shares.masked_fill(excluded, 0)
    if rule.top_p < 1:
        order = logits.sort(descending=True, stable=True).indices
        before = shares[order].cumsum(dim=0) - shares[order]
        shares[order[before >= math.ceil(rule.top_p * float(shares.sum()))]] = 0
    return shares


def shares_of(z: Tensor) -> Tensor:
    """Return ``exp(z)`` of each id as a whole number of ``1 / WHOLE``. z <= 0 is the id's logit minus the largest."""
    n = torch.round(z * 1.44269504)
    r = (z - n * 0.693359375) + n * 2.12194440e-4
    p = torch.full_like(z, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = p * r + coefficient
    scaled = (p.view(torch.int32) + (n.clamp_min(-126).int() << 23)).view(torch.float32)  # p 2^n
    return torch.round(scaled.masked_fill(z < -87.3, 0).double() * WHOLE).long()


def logprobs_of(logits: Tensor) -> Tensor:
    """Return the log-probabilities of ids, in float64, from their logits in float32."""
    top = logits.max()
    return (logits.double() - top) - math.log(float(shares_of(logits - top).sum()) / WHOLE)


def random_bits(key: tuple[int, int], place: int) -> int:
    """Return 53 random bits for a key and a place.

    Philox is a function of a key and a counter (Salmon et al. 2011), so no state has to be kept or restored.
    """
    bits = np.random.Philox(key=np.array([part % 2**64 for part in key], dtype=np.uint64), counter=[place, 0, 0, 0])
    return int(bits.random_raw()) >> 11


def allowed(mask: Tensor, vocabulary: int) -> Tensor:
    """Return a mask (vocabulary,) of booleans that is True for each id whose bit is set in ``mask``."""
    return ((mask[:, None] >> torch.arange(WORD, dtype=torch.int32)) & 1).bool().view(-1)[:vocabulary]


def _ids(ids: Ints) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)
