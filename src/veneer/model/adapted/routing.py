"""Mixed batches: the adapter of each row of a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from veneer.errors import CompositionError, ShapeError
from veneer.ops.grouped_low_rank import AdapterRuns, Run

BASE = "__base__"  # PEFT's name for a row that no adapter changes
Choice = tuple[str, int | None]  # an adapter, and one of its tasks if it has several


@dataclass(frozen=True)
class Routing:
    """Adapter of each row of a batch.

    ``names`` holds one adapter name, or ``"__base__"``, for each row. ``generators`` holds, for adapters that have
    their own, random generators (on the CPU) for dropout keys. ``is_by_token``: rows are single tokens, or their
    adapters act on a part of each, so that no start of an adapter remains to be found. ``tasks`` holds the task of each
    row, or None if its adapter has no tasks; it is empty if no row has one.
    """

    names: tuple[str, ...]
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    is_by_token: bool = False
    tasks: tuple[int | None, ...] = ()

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Pairs of adapter and task that occur, each once."""
        return tuple(choice for choice in dict.fromkeys(self._each) if choice[0] != BASE)

    @cached_property
    def _each(self) -> tuple[Choice, ...]:
        """Return, for each row, the name of its adapter and its task (None without tasks)."""
        return tuple(zip(self.names, self.tasks or (None,) * len(self.names), strict=True))

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """Adapters that occur, each once."""
        return tuple(name for name in dict.fromkeys(self.names) if name != BASE)

    @cached_property
    def runs(self) -> AdapterRuns:
        """Runs of consecutive rows with the same choice, by index in `choices`."""
        places = {choice: place for place, choice in enumerate(self.choices)}
        found, start = [], 0
        for choice, rows in groupby(self._each):
            stop = start + len(list(rows))
            if choice in places:
                found.append(Run(places[choice], start, stop))
            start = stop
        return AdapterRuns(tuple(found), len(self.names))

    def rows(self, n_rows: int, what: str) -> tuple[str, ...]:
        """Return the adapter's name for each of ``n_rows`` rows: the batch's rows, or each of them repeated equally
        often, one after the other.

        Rows are repeated in a beam search, or if the tokens of a sequence are rows. Raises ShapeError if ``n_rows`` is
        not a multiple of the batch's rows; the message names ``what``, the module that receives the rows.
        """
        times, left = divmod(n_rows, len(self.names))
        if left or not times:
            raise ShapeError(
                f"{what} receives {n_rows} rows, but adapter_names has {len(self.names)} entries: the rows cannot be "
                "assigned to adapters. Run the adapters one after another"
            )
        return tuple(name for name in self.names for _ in range(times))

    def chosen(self, n_rows: int, known: Sequence[Choice], what: str) -> Tensor:
        """Return, for each row, the index of its choice in ``known``, counted from 1; 0 if ``known``
        does not have it.
        """
        places = {choice: place for place, choice in enumerate(known, start=1)}
        times = len(self.rows(n_rows, what)) // len(self.names)
        return torch.tensor([places.get(choice, 0) for choice in self._each for _ in range(times)])

    def index(self, n_rows: int, known: Sequence[str], what: str) -> Tensor:
        """Return, for each row, the index of its adapter in ``known``, counted from 1; 0 if ``known``
        does not have it.
        """
        places = {name: place for place, name in enumerate(known, start=1)}
        return torch.tensor([places.get(name, 0) for name in self.rows(n_rows, what)])

    def groups(self, n_rows: int, known: Sequence[str], what: str, device: torch.device) -> list[tuple[str, Tensor]]:
        """Return the rows of each name in ``known``, and last, under ``"__base__"``, all other rows.

        Groups without rows are left out.
        """
        index = self.index(n_rows, known, what).to(device)
        found = [(name, (index == place).nonzero().squeeze(1)) for place, name in enumerate((BASE, *known))]
        return [(name, rows) for name, rows in (*found[1:], found[0]) if rows.numel()]

    def parts(self, n_rows: int, names: Sequence[str], what: str, device: torch.device) -> list[tuple[Choice, Tensor]]:
        """Return the rows of each of these adapters' `choices`, and last, under ``("__base__", None)``, all other rows.

        Groups without rows are left out.
        """
        known = [choice for choice in self.choices if choice[0] in names]
        index = self.chosen(n_rows, known, what).to(device)
        found = [(choice, (index == place).nonzero().squeeze(1)) for place, choice in enumerate(((BASE, None), *known))]
        return [(choice, rows) for choice, rows in (*found[1:], found[0]) if rows.numel()]


@dataclass(frozen=True)
class TokenRouting(Routing):
    """Adapter of each token of a batch: no adapter before the start in the token's row, and the row's adapter from the
    start on.

    ``starts`` holds, for each row, the first token on which its adapter acts. ``width`` is the number of tokens in a
    row.
    """

    starts: tuple[int, ...] = ()
    width: int = 0

    def at(self, kept: Sequence[int]) -> TokenRouting:
        """Return the routing of these tokens of each row alone.

        Raises ShapeError unless they are in ascending order.
        """
        if list(kept) != sorted(kept):
            raise ShapeError(
                f"logits_to_keep={list(kept)} is not in ascending order: an adapter with invocation tokens on the "
                "output head needs ascending positions. Sort them"
            )
        return replace(self, starts=tuple(bisect_left(kept, start) for start in self.starts), width=len(kept))

    @cached_property
    def runs(self) -> AdapterRuns:
        places = {choice: place for place, choice in enumerate(self.choices)}
        found = [
            Run(places[choice], row * self.width + start, (row + 1) * self.width)
            for row, (choice, start) in enumerate(zip(self._each, self.starts, strict=True))
            if choice in places and start < self.width
        ]
        return AdapterRuns(tuple(found), len(self.names) * self.width)

    def chosen(self, n_rows: int, known: Sequence[Choice], what: str) -> Tensor:
        return self.index(n_rows, (), what)

    def index(self, n_rows: int, known: Sequence[str], what: str) -> Tensor:
        """Raise CompositionError: ``what``, a module, computes on whole rows, but these adapters act on a part of each
        row.
        """
        raise CompositionError(
            f"{what} is computed on whole rows, but adapters with invocation tokens act on a part of each row: adapt "
            "linear layers alone, and run other adapters in a separate batch"
        )
