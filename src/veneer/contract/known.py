"""Facts of a model or a file from which fields of a config are filled in, in addition to its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Names = tuple[str, ...] | str  # of modules: names, suffixes and roles, or an expression on whole paths


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts from which a config's fields are filled in. ``names`` or ``shapes`` is empty if unknown.

    ``names``: for each field of the config that names modules and is None, the model's module names. ``shapes``: the
    shapes of a file's parameters, by module path and name.
    """

    names: Mapping[str, Names] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
