"""Functions that a model may call, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import ConfigError
from veneer.plain.nearest import nearest

MOST_FUNCTIONS = 128
_DEEPEST = 64  # levels of a schema
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, kw_only=True)
class Function:
    """Function that a model may call.

    ``parameters`` is the JSON schema of its arguments; if it is None, the function has none. If ``strict``, arguments
    always fit the schema. Raises ConfigError for an invalid name, and for a schema that does not describe an object.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the function name {str(self.name)[:80]!r} is invalid: 1 to 64 letters, digits, _ and - are allowed"
            )
        kind = None if self.parameters is None else self.parameters.get("type", "object")
        if kind not in (None, "object"):
            raise ConfigError(
                f"function {self.name!r}: parameters has type {kind!r}, but arguments are always an object. Set "
                '"type": "object" and name each argument in "properties"'
            )
        given = {} if self.parameters is None else self.parameters
        properties, required = given.get("properties") or {}, given.get("required") or []
        if not isinstance(properties, Mapping):
            raise ConfigError(f"function {self.name!r}: parameters.properties must be an object: schemas by argument")
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise ConfigError(f"function {self.name!r}: parameters.required must be a list of the names of arguments")
        if _is_deeper(given, _DEEPEST):
            raise ConfigError(
                f"function {self.name!r}: parameters is nested too deep: at most {_DEEPEST} levels. Flatten the schema"
            )

    @property
    def schema(self) -> dict[str, Any]:
        """Return the schema of the arguments, which always describes an object."""
        given = {"properties": {}} if self.parameters is None else self.parameters
        return {"type": "object", **{key: value for key, value in given.items() if value is not None}}

    def shown(self) -> dict[str, Any]:
        """Return the function as chat templates read it."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {k: v for k, v in told.items() if v is not None}}


@dataclass(frozen=True)
class Tools:
    """Functions that a model may call, and whether it calls them.

    ``mode`` is "none" (no calls), "auto" (the model decides) or "required" (at least one call). If a function is
    ``named``, it must be called. If ``parallel``, an answer may have several calls.

    Raises ConfigError for a choice that the functions do not offer, for functions of the same name, and for too many
    functions.
    """

    functions: Sequence[Function]
    mode: Mode = "auto"
    named: str | None = None
    parallel: bool = True
    by_name: Mapping[str, Function] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [function.name for function in self.functions]
        if len(names) > MOST_FUNCTIONS:
            raise ConfigError(f"{len(names)} tools are too many: at most {MOST_FUNCTIONS} are allowed. Send fewer")
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"two tools have the name {twice!r}: names must differ. Rename one")
        if (self.mode == "required" or self.named is not None) and not names:
            raise ConfigError("tool_choice asks for a call, and tools is empty: give tools, or leave tool_choice out")
        if self.named is not None and self.named not in names:
            close = nearest(self.named, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ConfigError(f"tool_choice names the function {self.named!r}, which tools lacks; {hint}")
        object.__setattr__(self, "by_name", {function.name: function for function in self.functions})

    @property
    def forced(self) -> bool:
        """Return True if the answer must be a call."""
        return self.mode == "required" or self.named is not None

    @property
    def strict(self) -> bool:
        """Return True if calls are optional and the arguments of each call must fit the function's schema."""
        return not self.forced and any(function.strict for function in self.functions)

    @property
    def callable(self) -> list[Function]:
        """Return the functions that an answer may call."""
        return [f for f in self.functions if self.named in (None, f.name)]


def _is_deeper(value: Any, levels: int) -> bool:
    """Return True if lists and mappings are nested deeper than ``levels``."""
    layer = [value]
    for _ in range(levels + 1):
        inner = (list(each.values()) if isinstance(each, Mapping) else each for each in layer)
        layer = [each for values in inner if isinstance(values, list) for each in values]
    return bool(layer)
