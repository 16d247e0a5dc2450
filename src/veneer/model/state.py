"""Adapters of a model and those that are active: one object, shared by every adapted module of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle

from veneer.contract import MethodConfig
from veneer.contract.training import Schedule
from veneer.model.routing import Routing


@dataclass
class AdapterState:
    """``configs`` by name, the ``active`` names in order, whether all are ``disabled``, and the names ``merged``.

    ``untied``: merging made the input embeddings and the head differ, so that the config no longer ties them.
    ``watch``: the hook that watches training steps. ``routing``: which adapter each row takes, in a mixed batch.
    ``trainable``: the names of those that train while they are active.
    ``schedules``: what acts on adapters after each optimizer step, by name, once training has begun.
    ``drops``: adapters drop in training what their configs say; False, for a while: nothing.
    """

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    merged: tuple[str, ...] = ()
    untied: bool = False
    watch: RemovableHandle | None = None
    routing: Routing | None = None
    trainable: set[str] = field(default_factory=set)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    drops: bool = True

    def acting(self) -> tuple[str, ...]:
        """Return the names whose records change the forward pass now, on all rows alike; none in a mixed batch."""
        return () if self.disabled or self.merged or self.routing else self.active

    def routed(self) -> Routing | None:
        """Return the adapter of each row now; None if all rows take the acting ones."""
        return None if self.disabled else self.routing

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """For a while no adapter acts."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """For a while no adapter drops anything, whatever its config says."""
        before, self.drops = self.drops, False
        try:
            yield
        finally:
            self.drops = before

    @contextmanager
    def route(self, routing: Routing | None) -> Iterator[None]:
        """For a while each row takes the adapter that it names; None: all rows take the active ones."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def only(self, names: tuple[str, ...]) -> Iterator[None]:
        """For a while these adapters act, on all rows alike."""
        before = self.active
        with self.route(None):
            self.active = names
            try:
                yield
            finally:
                self.active = before
