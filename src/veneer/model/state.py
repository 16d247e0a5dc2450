"""Which adapters of a model exist and which are active: one object, shared by every adapted module of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.core.method import MethodConfig


@dataclass
class AdapterState:
    """``configs`` by name, the ``active`` names in order, whether all are ``disabled``, and the names ``merged``."""

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    merged: tuple[str, ...] = ()

    def acting(self) -> tuple[str, ...]:
        """The names whose records change the forward pass now."""
        return () if self.disabled or self.merged else self.active
