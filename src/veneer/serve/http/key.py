"""Key of a client, with its rights and its limits. The key of the current request."""

from __future__ import annotations

import fnmatch
import re
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

INFER, ADMIN = "infer", "admin"
SCOPES = (INFER, ADMIN)


@dataclass(frozen=True, kw_only=True)
class Key:
    """Key of a client. ``adapters`` are shell patterns (``sql-*``) of the adapters that the client may see.

    ``weight`` is the client's weight in fair sharing. ``max_requests`` limits its choices in flight, ``max_tokens``
    their tokens; None is no limit. ``name`` is None if the server has no keys.
    """

    name: str | None = None
    scopes: frozenset[str] = frozenset(SCOPES)
    adapters: tuple[str, ...] = ("*",)
    weight: float = 1.0
    max_requests: int | None = None
    max_tokens: int | None = None

    def sees(self, adapter: str) -> bool:
        """Return True if the client may know of an adapter."""
        return self.sees_all or self._pattern.fullmatch(adapter) is not None

    @property
    def sees_all(self) -> bool:
        """Return True if no adapter is hidden from the client."""
        return "*" in self.adapters

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(fnmatch.translate, self.adapters)) or r"(?!)")


ANYBODY = Key()
"""Key of local clients of a server without keys."""
NOBODY = Key(scopes=frozenset(), adapters=())
"""Key outside of any request, if the server has keys: it allows nothing."""
CALLER: ContextVar[Key] = ContextVar("caller")
"""Key of the current request, also on the threads that work for it."""
