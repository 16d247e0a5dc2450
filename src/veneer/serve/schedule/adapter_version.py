"""Version of an adapter, and its state in the pool. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """Content of an adapter's files. ``id`` is derived from the content, so that equal files are one version.

    ``n_front`` counts its virtual tokens. If ``invocation`` tokens are given, the adapter acts from them on. ``rank``
    is the largest of its low-rank parts, 0 if it has none. ``n_bytes`` is its expected size when loaded. ``warning``:
    the reason to doubt that it was trained on this base. ``has_head``: it has a classification head. A mix has no
    folder, but consists of versions with weights.
    """

    id: str
    folder: str = ""
    kind: str = ""
    rank: int = 0
    n_front: int = 0
    invocation: tuple[int, ...] = ()
    n_bytes: int = 0
    warning: str = ""
    has_head: bool = False
    parts: tuple[tuple[AdapterVersion, float], ...] = ()

    @property
    def told(self) -> str:
        """Text that names its folder, or the folders of a mix with their weights."""
        return self.folder or " + ".join(f"{weight:g} × {part.folder}" for part, weight in self.parts)


class Residency(enum.Enum):
    """State of a version's weights: only on disk, loading, or loaded. A version that fails to load is forgotten."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUsage:
    """State of the adapter version that a name refers to, and its use since it got a name.

    ``n_requests`` counts its requests, and ``n_hits`` those that found it loaded.
    """

    version: AdapterVersion
    n_bytes: int
    residency: Residency
    pinned: bool
    n_requests: int
    n_hits: int
