"""Facts of a model or a file that fill in a config, in addition to its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Names = tuple[str, ...] | str  # of modules: names, suffixes and roles, or an expression on whole paths


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts that fill in a config.

    ``names`` holds, for the config's fields that name modules and are None, the names that the model has. ``shapes``
    holds those of a file's parameters, by module path and name. Either is empty if unknown.
    """

    names: Mapping[str, Names] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
