"""Which adapters of a model exist and which are active: one object, shared by every adapted module of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle

from veneer.core.method import MethodConfig


@dataclass
class AdapterState:
    """``configs`` by name, the ``active`` names in order, whether all are ``disabled``, and the names ``merged``.

    ``untied``: merging made the input embeddings and the head differ, so that the config no longer ties them.
    ``watch``: the hook that watches training steps.
    """

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    merged: tuple[str, ...] = ()
    untied: bool = False
    watch: RemovableHandle | None = None

    def acting(self) -> tuple[str, ...]:
        """The names whose records change the forward pass now."""
        return () if self.disabled or self.merged else self.active

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """For a while no adapter acts."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before
