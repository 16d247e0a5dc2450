"""Attention of branches (answers) to their stem (the prompt that they share), which is computed once for all.

Attention within sequences leaves the stem out. Here the stem's keys are added to each query's softmax, by the log of
its sum so far. The backward pass within sequences then reads the joined outputs and sums, and is exact as it is
(Dao 2023, arXiv 2307.08691: probabilities are exp(score - log sum)).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = 1 << 18  # of all heads, that are made at once: they stay in a cache


@dataclass(frozen=True, slots=True)
class Fork:
    """Shared beginning of several sequences. The sequences within the tokens ``branches`` also attend to the tokens
    ``stem``.
    """

    stem: slice
    branches: slice


@dataclass(frozen=True, slots=True)
class ScoreForm:
    """Scale, window and soft cap of attention scores in the kernels' form: 0 means no window or no cap."""

    scale: float
    window: int
    softcap: float


Heads = tuple[Tensor, Tensor, Tensor]


def join_stems(
    qkv: Heads, out: Tensor, lse: Tensor, forks: Sequence[Fork], bounds: Sequence[int], scoring: ScoreForm
) -> None:
    """Let queries of branches attend to their stems too, given the results of attention within sequences.

    Those results, ``out`` (n, q_heads, d) and the log sums ``lse`` (q_heads, n), are updated in place. ``bounds`` are
    the positions at which sequences begin, and the end of the last.
    """
    n_kv_heads = qkv[1].shape[1]
    for fork in forks:
        stem = _Stem(qkv, fork, bounds, scoring)
        for rows in stem.chunks():
            scores, _ = stem.scores(rows)
            most = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # if none is seen
            p = scores.sub_(most).exp_()
            total = p.sum(dim=-1, keepdim=True)
            there, own = most + total.log(), _by_query(lse[:, rows], n_kv_heads)
            joined = torch.logaddexp(own, there)
            found = p @ stem.v * torch.exp(most - joined)
            found += _by_head(out[rows], n_kv_heads) * torch.exp(own - joined)
            out[rows] = _by_token(found, out[rows])
            lse[:, rows] = joined.view(n_kv_heads, -1, lse.shape[0] // n_kv_heads).transpose(1, 2).reshape(len(lse), -1)


def add_stem_gradients(
    dout: Tensor,
    qkv: Heads,
    forward: tuple[Tensor, Tensor],
    gradients: Heads,
    forks: Sequence[Fork],
    bounds: Sequence[int],
    scoring: ScoreForm,
) -> None:
    """Add the gradients that flow between branches and stems to (dq, dk, dv) of attention within sequences, in place.

    ``forward`` are the outputs and log sums of `join_stems`.
    """
    (out, lse), (dq, dk, dv), n_kv_heads = forward, gradients, qkv[1].shape[1]
    for fork in forks:
        stem = _Stem(qkv, fork, bounds, scoring)
        for rows in stem.chunks():
            scores, slope = stem.scores(rows)
            do = _by_head(dout[rows], n_kv_heads)
            p = scores.sub_(_by_query(lse[:, rows], n_kv_heads)).exp_()
            dv[stem.seen] += (p.mT @ do).transpose(0, 1)
            delta = (do * _by_head(out[rows], n_kv_heads)).sum(dim=-1, keepdim=True)
            ds = (do @ stem.v.mT).sub_(delta).mul_(p)
            ds = ds if slope is None else ds.mul_(slope)
            dq[rows] += _by_token((ds @ stem.k).mul_(scoring.scale), dq[rows])
            dk[stem.seen] += (ds.mT @ stem.queries(rows)).transpose(0, 1)


class _Stem:
    """Keys and values of a fork's stem in at least float32, (kv_heads, n_seen, d), and the scores of the branches'
    queries on these keys.

    ``seen`` is the slice of the stem's tokens that a query's window may reach.
    """

    def __init__(self, qkv: Heads, fork: Fork, bounds: Sequence[int], scoring: ScoreForm) -> None:
        self.fork, self.bounds, self.scoring = fork, bounds, scoring
        self._q, k, v = qkv
        end = fork.stem.stop
        self.seen = slice(max(fork.stem.start, end - scoring.window + 1) if scoring.window else fork.stem.start, end)
        self.k, self.v = (_wide(x[self.seen].transpose(0, 1)).contiguous() for x in (k, v))

    def chunks(self) -> Iterator[slice]:
        """Yield slices of the branches' rows, each with at most `SCORES` scores, or a single row."""
        start, stop = self.fork.branches.start, self.fork.branches.stop
        step = max(1, SCORES // max(1, self._q.shape[1] * self.k.shape[1]))
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))

    def queries(self, rows: slice) -> Tensor:
        """Return the queries (kv_heads, rows · group, d), times the scale."""
        return _by_head(self._q[rows], len(self.k)) * self.scoring.scale

    def scores(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the scores (kv_heads, rows · group, n_seen) and the derivative of the soft cap, None without a cap.

        Scores outside a window are minus infinity.
        """
        scores = self.queries(rows) @ self.k.mT
        if not self.scoring.softcap:
            return self._hidden(scores, rows), None
        tanh = torch.tanh(scores / self.scoring.softcap)
        return self._hidden(self.scoring.softcap * tanh, rows), 1 - tanh**2

    def _hidden(self, scores: Tensor, rows: slice) -> Tensor:
        if not self.scoring.window:
            return scores
        each = range(rows.start, rows.stop)
        places = [i - self.bounds[bisect_right(self.bounds, i) - 1] for i in each]  # within their branches
        group = scores.shape[1] // len(each)
        place = torch.tensor(places, device=scores.device).repeat_interleave(group)
        behind = self.seen.stop - torch.arange(self.seen.start, self.seen.stop, device=scores.device)
        return scores.masked_fill_(place[:, None] + behind >= self.scoring.window, float("-inf"))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x: Tensor, n_kv_heads: int) -> Tensor:
    """Rearrange (n, q_heads, d) to (kv_heads, n · group, d), in at least float32."""
    n, heads, d = x.shape
    own = _wide(x).reshape(n, n_kv_heads, heads // n_kv_heads, d)
    return own.transpose(0, 1).reshape(n_kv_heads, -1, d)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """Rearrange (kv_heads, n · group, d) to (n, q_heads, d), in the dtype of ``like``."""
    n, heads, d = like.shape
    return x.view(len(x), n, heads // len(x), d).transpose(0, 1).reshape(n, heads, d).to(like.dtype)


def _by_query(lse: Tensor, n_kv_heads: int) -> Tensor:
    """Rearrange (q_heads, n) to (kv_heads, n · group, 1)."""
    heads, n = lse.shape
    return lse.reshape(n_kv_heads, heads // n_kv_heads, n).transpose(1, 2).reshape(n_kv_heads, -1, 1)
