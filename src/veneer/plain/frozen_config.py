"""Configs that refuse to be changed, with the way out in the error."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from veneer.errors import FrozenConfigError


class FrozenConfigMeta(ABCMeta):
    """Metaclass that keeps the ``__setattr__`` of `FrozenConfig`, which ``dataclass(frozen=True)`` would replace."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name != "__setattr__":
            super().__setattr__(name, value)


class FrozenConfig(metaclass=FrozenConfigMeta):
    """Base class of configs. Setting a field raises FrozenConfigError, which names the call that returns a changed
    copy.

    Fields are set only once, when the config is created.
    """

    def __setattr__(self, name: str, value: object) -> None:
        kind = type(self).__name__
        raise FrozenConfigError(
            f"{kind}.{name} cannot be set: a config stays as it was made, and checked. Make another with "
            f"dataclasses.replace(config, {name}={value!r}) before it is attached"
        )
