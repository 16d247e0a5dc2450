"""Group of settings within a config, in the fields of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from veneer.errors import ConfigError
from veneer.plain.field_types import check


@dataclass(frozen=True)
class Settings:
    """Base class of groups of settings, whose fields are checked on creation.

    Raises ConfigError with all problems.
    """

    def __post_init__(self) -> None:
        check(self, self.problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the settings from a file's fields. Raises ConfigError for an unknown field."""
        known = [spec.name for spec in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown keys {unknown}; known: {known}")
        return cls(**values)

    def problems(self) -> list[str]:
        """Return all problems of values that have the right types."""
        return []
