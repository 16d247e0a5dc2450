"""The rows of one pass of a program: tokens of many sequences, each with its adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.model.paged import PagedStore, Stretch
from veneer.ops.grouped_low_rank import AdapterRuns, Run


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one sequence, its version's rows beside each other: where they go, and who takes them.

    ``version`` is None for the base. ``kept`` are the tokens, counted from the piece's first, whose logits are wanted.
    """

    stretch: Stretch
    version: str | None = None
    kept: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with equally many new tokens, g of them with c each, over L slots at most.

    ``rows`` (g, c) of the pass, ``slots`` (g, L) of what they may see, and its place in the sequence, from 0: of the
    new tokens ``places`` (g, c).
    """

    rows: Tensor
    places: Tensor
    slots: Tensor


@dataclass(slots=True)
class Step:
    """``positions`` (n,) are what embeddings and rotations go by, ``slots`` (n,) where keys and values go.

    ``versions`` are the adapters that occur, ``runs`` the rows that each of them takes; ``kept`` and ``kept_runs`` are
    the same of the rows whose logits are wanted. ``shared`` is for what instructions compute once a step.
    """

    store: PagedStore
    positions: Tensor
    slots: Tensor
    groups: list[Group]
    versions: tuple[str, ...]
    runs: AdapterRuns
    kept: Tensor
    kept_runs: AdapterRuns
    shared: dict[Any, Any] = field(default_factory=dict)


def step_of(pieces: Sequence[Piece], store: PagedStore, device: torch.device, first_position: int = 0) -> Step:
    """The rows of these pieces, one after the other. ``first_position`` is what each sequence begins at."""
    lengths = [piece.stretch.n for piece in pieces]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    places = np.concatenate([np.arange(p.stretch.start, p.stretch.start + p.stretch.n) for p in pieces])
    every = [_slots(piece.stretch, store.block) for piece in pieces]
    slots = np.concatenate([at[piece.stretch.start :] for piece, at in zip(pieces, every, strict=True)])
    kept = [bound + np.array(p.kept, dtype=np.int64) for bound, p in zip(bounds, pieces, strict=False)]
    versions = tuple(dict.fromkeys(p.version for p in pieces if p.version is not None))
    return Step(
        store=store,
        positions=torch.from_numpy(places + first_position).to(device),
        slots=torch.from_numpy(slots).to(device),
        groups=_groups(lengths, bounds, places, every, device),
        versions=versions,
        runs=_runs([(p.version, p.stretch.n) for p in pieces], versions),
        kept=torch.from_numpy(np.concatenate(kept)).to(device),
        kept_runs=_runs([(p.version, len(p.kept)) for p in pieces], versions),
    )


def _slots(stretch: Stretch, block: int) -> np.ndarray:
    """The slots of all positions of a sequence."""
    pages = np.array(stretch.pages, dtype=np.int64)
    every = (pages[:, None] * block + np.arange(block)).reshape(-1)
    return every[: stretch.start + stretch.n]


def _runs(counts: Sequence[tuple[str | None, int]], versions: tuple[str, ...]) -> AdapterRuns:
    found: list[Run] = []
    at = 0
    for version, n in counts:
        if version is not None and n:
            number = versions.index(version)
            last = found[-1] if found else None
            if last is not None and (last.adapter, last.stop) == (number, at):
                found[-1] = Run(number, last.start, at + n)
            else:
                found.append(Run(number, at, at + n))
        at += n
    return AdapterRuns(tuple(found), at)


def _groups(
    lengths: list[int], bounds: np.ndarray, places: np.ndarray, every: list[np.ndarray], device: torch.device
) -> list[Group]:
    found = []
    for n in dict.fromkeys(lengths):
        members = [i for i, length in enumerate(lengths) if length == n]
        rows = bounds[members][:, None] + np.arange(n)
        slots = np.zeros((len(members), max(len(every[i]) for i in members)), dtype=np.int64)
        for row, i in zip(slots, members, strict=True):
            row[: len(every[i])] = every[i]
            row[len(every[i]) :] = every[i][-1]  # what is hidden must be finite all the same
        found.append(Group(*(torch.from_numpy(x).to(device) for x in (rows, places[rows], slots))))
    return found
