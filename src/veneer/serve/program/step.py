"""New tokens of sequences (pieces), and the rows of a pass that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from veneer.model.batch.paged import Stretch
from veneer.model.program.rows import PassRows
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.ops.memory import whole_numbers
from veneer.plain.tensor_tree import Held, in_one_copy
from veneer.serve.program.kv_cache import KVCache


class Piece(NamedTuple):
    """New tokens of one sequence: their positions in pages (``stretch``), and the adapter version that acts on them.

    Pieces of one version must be adjacent; ``version`` is None for the base. ``kept``: indices in the piece of the
    tokens whose logits are returned. ``n_picked``: for this many last tokens, only the argmax of the logits is
    returned. ``read``: indices of the tokens whose hidden states are returned.
    """

    stretch: Stretch
    version: str | None = None
    kept: Sequence[int] = ()
    n_picked: int = 0
    read: Sequence[int] = ()


def step_of(pieces: Sequence[Piece], cache: KVCache, device: torch.device, first_position: int = 0) -> PassRows:
    """Return the rows of these pieces on a device, in order.

    Each sequence begins at the position ``first_position``.
    """
    return sent(step_on_host(pieces, cache, first_position), device, ())[0]


def sent(step: PassRows, device: torch.device, beside: Held) -> tuple[PassRows, Held]:
    """Return a step, and the tensors of ``beside``, copied to a device. One copy transfers all integer tensors."""
    if device.type == "cpu":
        return step, beside
    own: dict[str, Any] = {name: getattr(step, name) for name in ("positions", "kept", "picked", "tokens", "read")}
    tables = [each.table for each in step.segments.values()]
    own, rows, tables, beside = in_one_copy((own, step.rows, tables, beside), device)
    there = zip(step.segments.items(), tables, strict=True)
    segments = {key: replace(each, table=table) for (key, each), table in there}
    return replace(step, rows=rows, segments=segments, **own), beside


def step_on_host(pieces: Sequence[Piece], cache: KVCache, first_position: int = 0) -> PassRows:
    """Return the rows of these pieces as `step_of` does, with index tensors in host memory."""
    positions, kept, picked, read, at = list[int](), list[int](), list[int](), list[int](), 0
    for (_, start, n), _, rows, n_picked, states in pieces:
        positions.extend(range(start + first_position, start + first_position + n))
        kept.extend(at + row for row in rows)
        read.extend(at + row for row in states)
        at += n
        picked.extend(range(at - n_picked, at))
    named = [piece.version for piece in pieces]
    versions = tuple(dict.fromkeys(version for version in named if version is not None))
    numbers = whole_numbers([*positions, *kept, *picked, *([-1] * len(picked)), *read])
    counts = [at, len(kept), len(picked), len(picked), len(read)]
    of_rows, of_kept, of_picked, tokens, of_read = torch.split(numbers, counts)
    return PassRows(
        cache=cache,
        rows=cache.rows([piece.stretch for piece in pieces]),
        positions=of_rows,
        versions=versions,
        runs=_runs(named, [piece.stretch.n for piece in pieces], versions),
        kept=of_kept,
        kept_runs=_runs(named, [len(piece.kept) for piece in pieces], versions),
        picked=of_picked,
        picked_runs=_runs(named, [piece.n_picked for piece in pieces], versions),
        tokens=tokens,
        read=of_read,
        read_runs=_runs(named, [len(piece.read) for piece in pieces], versions),
    )


def _runs(named: Sequence[str | None], counts: Sequence[int], versions: tuple[str, ...]) -> AdapterRuns:
    """Return the runs of consecutive rows with the same adapter version; rows of the base are in no run.

    ``named`` and ``counts`` are the version and the number of rows of each piece.
    """
    n_rows = sum(counts)
    if not versions or not n_rows:
        return AdapterRuns((), n_rows)
    places, found, at = {version: place for place, version in enumerate(versions)}, list[Run](), 0
    for version, group in groupby(zip(named, counts, strict=True), itemgetter(0)):
        n = sum(count for _, count in group)
        if version is not None and n:
            found.append(Run(places[version], at, at + n))
        at += n
    return AdapterRuns(tuple(found), n_rows)
