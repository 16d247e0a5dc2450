"""Errors for unknown keywords of a dataclass, which name the nearest known keyword. No torch."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, ClassVar

from veneer.errors import ConfigError


class Keywords(type):
    """Metaclass that raises ConfigError for unknown keywords, and names the nearest known one.

    ``not_offered`` lists keywords of other libraries that this class lacks, so that no user relies on them.
    ``given_to`` is the name of the class to which users pass these keywords, if it is another one.
    """

    not_offered: ClassVar[tuple[str, ...]] = ()
    given_to: ClassVar[str] = ""

    def __call__(cls, **given: Any) -> Any:
        known = [spec.name for spec in fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError("; ".join(cls._said(name, known) for name in unknown))
        return super().__call__(**given)

    def _said(cls, name: str, known: list[str]) -> str:
        owner = cls.given_to or cls.__name__
        if name in cls.not_offered:
            return f"{owner}: {name} is not offered by this engine: leave it out"
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {known}"
        return f"{owner} has no field {name!r}; {hint}"
