"""Scan of a linear recurrence in plain torch, in chunks of tokens: the specification.

Within a chunk the recurrence is a triangular system (Yang et al. 2024, arXiv 2406.06484, section 3). Chunks of all
sequences are computed at once, and the states of all sequences go from their first chunks to their last together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from veneer.ops.state.scan import CHUNK, ScanInput


def scan(given: ScanInput, cu_seqlens: Tensor, delta: bool, known: Tensor | None) -> Tensor:
    wide = torch.promote_types(given.v.dtype, torch.float32)
    chunks = _Chunks.of(cu_seqlens.tolist(), given.v.device)
    q, k, v, log_decay, beta = (chunks.split(x.to(wide)) for x in given.tensors)
    return chunks.joined(_chunked(q, k, v, (log_decay, beta), chunks, delta)).to(given.v.dtype)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Chunks of c tokens: the first chunk of every sequence, then all second chunks, and so on, longer sequences first.

    ``rows`` (chunks, c) are the row numbers of a chunk's tokens; a chunk with fewer tokens ends with n, the number of
    all tokens. ``places`` (n,) are the tokens' indices in the flattened chunks. ``counts`` are the numbers of first
    chunks, of second chunks, and so on.
    """

    rows: Tensor
    places: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, bounds: list[int], device: torch.device) -> _Chunks:
        """Return the chunks of sequences with these bounds."""
        sequences = sorted(((a, b) for a, b in pairwise(bounds) if b > a), key=lambda s: s[0] - s[1])
        longest = max((b - a for a, b in sequences), default=1)
        size, n = min(CHUNK, longest), bounds[-1]
        steps = [[(a + i, b) for a, b in sequences if a + i < b] for i in range(0, longest, size)]
        starts = torch.tensor([chunk for step in steps for chunk in step], dtype=torch.long).view(-1, 2)
        rows = starts[:, :1] + torch.arange(size)
        rows = rows.where(rows < starts[:, 1:], n)
        places = torch.empty(n + 1, dtype=torch.long)
        places[rows.flatten()] = torch.arange(rows.numel())
        return cls(rows.to(device), places[:n].to(device), tuple(map(len, steps)))

    def split(self, x: Tensor) -> Tensor:
        """Return values (n, h, …) of tokens by chunk and head, (chunks, h, c, …). Absent tokens are zeros."""
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return padded[self.rows].transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """Return values (chunks, h, c, …) as (n, h, …) in the order of the tokens: the inverse of `split`."""
        return x.transpose(1, 2).flatten(0, 1)[self.places]

    def steps(self) -> Iterator[slice]:
        """Yield the slice of all sequences' first chunks, then the slice of all second chunks, and so on."""
        start = 0
        for count in self.counts:
            yield slice(start, start + count)
            start += count


def _chunked(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor], chunks: _Chunks, delta: bool) -> Tensor:
    """Return the outputs (chunks, h, c, d_v) for queries and keys (chunks, h_k, c, d_k), values, and the logarithms of
    decays and weights (chunks, h, c).
    """
    log_decay, beta = gates
    group = v.shape[1] // q.shape[1]
    decayed = log_decay.cumsum(-1)  # since the beginning of the chunk
    between = decayed[..., :, None] - decayed[..., None, :]
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=v.device).triu(1)
    between = between.masked_fill(later, -torch.inf).exp()
    reads = _shared(q @ k.mT, group) * between
    queries, keys = _shared(q, group), _shared(k, group)
    from_start = decayed.exp()[..., None]
    new = beta[..., None] * v
    seen = None
    if delta:
        system = beta[..., None] * _shared(k @ k.mT, group) * between
        seen = torch.linalg.solve_triangular(
            system, beta[..., None] * from_start * keys, upper=False, unitriangular=True
        )
        new = torch.linalg.solve_triangular(system, new, upper=False, unitriangular=True)
    queries = queries * from_start
    keys = (keys * (decayed[..., -1:] - decayed).exp()[..., None]).mT
    last = decayed[..., -1].exp()[..., None, None]
    state = v.new_zeros(chunks.counts[0] if chunks.counts else 0, v.shape[1], k.shape[-1], v.shape[-1])
    outputs = []
    for own in chunks.steps():
        state = state[: own.stop - own.start]
        written = new[own] if seen is None else new[own] - seen[own] @ state
        outputs.append(queries[own] @ state + reads[own] @ written)
        state = last[own] * state + keys[own] @ written
    return torch.cat(outputs) if outputs else v


def _shared(x: Tensor, group: int) -> Tensor:
    """Return each head of x (chunks, h_k, …) repeated ``group`` times, one copy for each of the consecutive heads that
    share it.
    """
    return x if group == 1 else x.repeat_interleave(group, dim=1)
