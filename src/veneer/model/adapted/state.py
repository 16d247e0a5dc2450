"""State of a model's adapters: one object, shared by every adapted module of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.contract import MethodConfig
from veneer.contract.training import Schedule
from veneer.model.adapted.routing import Routing
from veneer.records.sequences import Sequences


@dataclass
class AdapterState:
    """State of a model's adapters: ``configs`` by name, the ``active`` names in order, the names ``merged``.

    ``disabled``: all adapters are switched off. ``untied``: merging made the input embeddings and the head differ, so
    that the config no longer ties them. ``watch``: the hook that watches training steps. ``routing``: the adapter of
    each row, in a mixed batch. ``starts``: in a generation, the first token of each prompt on which its adapter acts.
    ``sequences``: the sequences of the current pass, if an adapter depends on them. ``tasks``: by adapter name, the
    task for rows that name no task. ``trainable``: the names of the adapters that are trained while they are active.
    ``schedules``: by adapter name, the actions after each optimizer step, once training has begun. ``drops``: adapters
    apply the dropout of their configs in training, and draw random numbers; False switches both off temporarily.
    """

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    merged: tuple[str, ...] = ()
    untied: bool = False
    watch: RemovableHandle | None = None
    routing: Routing | None = None
    starts: tuple[int, ...] | None = None
    sequences: Sequences | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    drops: bool = True

    def acting(self) -> tuple[str, ...]:
        """Return the names whose records change the forward pass now, on all rows alike; none in a mixed batch."""
        return () if self.disabled or self.merged or self.routing else self.active

    def routed(self) -> Routing | None:
        """Return the current adapter of each row, or None if all rows use the same ones."""
        return None if self.disabled else self.routing

    def acting_on_rows(self) -> tuple[str, ...]:
        """Return the names of the adapters that act now, on all rows or on some."""
        routing = self.routed()
        return self.acting() if routing is None else tuple(routing.adapters)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Enter a context in which no adapter acts."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Enter a context in which no adapter has dropout, whatever its config says."""
        before, self.drops = self.drops, False
        try:
            yield
        finally:
            self.drops = before

    @contextmanager
    def route(self, routing: Routing | None) -> Iterator[None]:
        """Enter a context in which each row uses the adapter that ``routing`` names. If it is None, all rows use the
        active ones.
        """
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def knowing(self, sequences: Sequences | None) -> Iterator[None]:
        """Enter a context for a pass over these sequences, which adapters can read."""
        before, self.sequences = self.sequences, sequences
        try:
            yield
        finally:
            self.sequences = before

    @contextmanager
    def only(self, names: tuple[str, ...], *, task: int | None = None, rows: Tensor | None = None) -> Iterator[None]:
        """Enter a context in which only these adapters act, on all rows alike, even if adapters are switched off.

        ``task``: replaces the chosen task of adapters that have several. ``rows``: the indices of the pass's rows that
        are in the input.
        """
        before = self.active, self.disabled, self.tasks
        known = self.sequences if self.sequences is None or rows is None else self.sequences.of_rows(rows)
        with self.route(None), self.knowing(known):
            self.active, self.disabled = names, False
            if task is not None:
                self.tasks = {**self.tasks, **dict.fromkeys(names, task)}
            try:
                yield
            finally:
                self.active, self.disabled, self.tasks = before


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Enter a context in which none of a model's adapters acts, if it has any."""
    state = getattr(model, "adapter_state", None)
    if state is None:
        yield
        return
    with state.base_alone():
        yield
