"""Entry of a version in the pool of adapters. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.serve.schedule.adapter_version import AdapterVersion, Residency


@dataclass(eq=False, slots=True)
class PoolEntry:
    """Known adapter version: its names, the requests that need it, whether it is loaded, and its value for eviction."""

    version: AdapterVersion
    n_bytes: int
    names: set[str] = field(default_factory=set)
    waiting: int = 0  # requests that will need it, those in the batch not counted
    running: int = 0
    pinned: bool = False
    residency: Residency = Residency.ABSENT
    n_uses: int = 0  # by requests, since it was loaded
    n_requests: int = 0
    n_hits: int = 0
    seconds: float = 0.0  # that its load took
    worth: float = 0.0
    used: int = 0

    @property
    def is_needed(self) -> bool:
        """Return True if a name refers to it, or a request needs it."""
        return bool(self.names or self.waiting or self.running)

    @property
    def is_idle(self) -> bool:
        """Return True if it is loaded and may be evicted."""
        return self.residency is Residency.RESIDENT and not self.running and not self.pinned

    @property
    def rank(self) -> tuple[bool, float, int] | None:
        """Rank in the order of eviction, the lowest first; None if the version may not be evicted.

        Versions that requests wait for come last, others by their value, and those of equal value by their last use.
        """
        return (self.waiting > 0, self.worth, self.used) if self.is_idle else None
