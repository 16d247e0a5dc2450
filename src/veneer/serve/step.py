"""The rows of one pass of a program: tokens of many sequences, each with its adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.model.paged import Stretch
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.serve.kv_cache import KVCache


class Piece(NamedTuple):
    """New tokens of one sequence, those of a version side by side: where they go, and who takes them.

    ``version`` is None for the base. ``kept`` are the tokens, counted from the piece's first, whose logits are wanted.
    ``picks``: the likeliest token behind the last is wanted, and not its logits.
    """

    stretch: Stretch
    version: str | None = None
    kept: Sequence[int] = ()
    picks: bool = False


@dataclass(slots=True)
class Step:
    """``positions`` (n,) are what embeddings and rotations go by; ``rows`` is what the ``cache`` knows of its rows.

    ``versions`` are the adapters that occur, ``runs`` the rows that each of them takes; ``kept`` and ``kept_runs`` are
    the same of the rows whose logits are wanted. ``picked`` and ``picked_runs`` are those whose likeliest token is,
    which ``tokens`` takes; -1 where a logit is not finite. ``written`` takes the keys and values of every layer, where
    it is a list.
    """

    cache: KVCache
    rows: Any
    positions: Tensor
    versions: tuple[str, ...]
    runs: AdapterRuns
    kept: Tensor
    kept_runs: AdapterRuns
    picked: Tensor
    picked_runs: AdapterRuns
    tokens: Tensor
    written: list[tuple[Tensor, Tensor]] | None = None
    _turns: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def turns(self, tables: tuple[Tensor, Tensor], rotation: Any) -> tuple[Tensor, Tensor]:
        """cos and sin of the rows (1, n, half), by the tables of a rotation."""
        if rotation not in self._turns:
            cos, sin = (table[self.positions][None] for table in tables)
            self._turns[rotation] = (cos, sin)
        return self._turns[rotation]


def step_of(pieces: Sequence[Piece], cache: KVCache, device: torch.device, first_position: int = 0) -> Step:
    """The rows of these pieces, one after the other. ``first_position`` is what each sequence begins at."""
    positions, kept, picked, at = list[int](), list[int](), list[int](), 0
    for piece in pieces:
        start = piece.stretch.start + first_position
        positions.extend(range(start, start + piece.stretch.n))
        kept.extend(at + row for row in piece.kept)
        at += piece.stretch.n
        if piece.picks:
            picked.append(at - 1)
    versions = tuple(dict.fromkeys(p.version for p in pieces if p.version is not None))
    numbers = torch.tensor([*positions, *kept, *picked, *([-1] * len(picked))], dtype=torch.long, device=device)
    of_rows, of_kept, of_picked, tokens = torch.split(numbers, [at, len(kept), len(picked), len(picked)])
    return Step(
        cache=cache,
        rows=cache.rows([piece.stretch for piece in pieces]),
        positions=of_rows,
        versions=versions,
        runs=_runs([(p.version, p.stretch.n) for p in pieces], versions),
        kept=of_kept,
        kept_runs=_runs([(p.version, len(p.kept)) for p in pieces], versions),
        picked=of_picked,
        picked_runs=_runs([(p.version, int(p.picks)) for p in pieces], versions),
        tokens=tokens,
    )


def _runs(counts: Sequence[tuple[str | None, int]], versions: tuple[str, ...]) -> AdapterRuns:
    found: list[Run] = []
    if not versions:
        return AdapterRuns((), sum(n for _, n in counts))
    places, at = {version: place for place, version in enumerate(versions)}, 0
    for version, n in counts:
        if version is not None and n:
            last = found[-1] if found else None
            if last is not None and (last.adapter, last.stop) == (places[version], at):
                found[-1] = Run(last.adapter, last.start, at + n)
            else:
                found.append(Run(places[version], at, at + n))
        at += n
    return AdapterRuns(tuple(found), at)
