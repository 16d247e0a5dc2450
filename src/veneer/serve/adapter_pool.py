"""The pool of adapters: versions known by name, those loaded, and those that go out for others. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from veneer.errors import AdapterNameError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """An adapter as its files are: ``id`` is made of their content, so that equal files are one version.

    ``n_front`` counts its virtual tokens, ``rank`` is the largest of its low-rank parts (0 where it has none).
    """

    id: str
    folder: str
    kind: str = ""
    rank: int = 0
    n_front: int = 0


@dataclass(eq=False, slots=True)
class _Entry:
    version: AdapterVersion
    names: set[str] = field(default_factory=set)
    waiting: int = 0  # requests that will need it, those in the batch not counted
    running: int = 0
    pinned: bool = False
    resident: bool = False
    used: int = 0


class AdapterPool:
    """Names → versions → what is loaded, of which there are at most ``n_resident``, and ``n_acting`` in one batch.

    Laws: a version with requests in the batch, or pinned, does not go out; at most ``n_resident`` are loaded; one
    without a name and without requests is unloaded; two names of equal content are one version. None is no limit.
    """

    def __init__(self, n_resident: int | None = None, n_acting: int | None = None) -> None:
        limits = [n for n in (n_resident, n_acting) if n is not None]
        if any(n < 1 for n in limits):
            raise ConfigError(f"at most {limits} adapters loaded and in a batch: there must be room for one")
        self.n_resident, self.n_acting = n_resident, n_acting
        self._entries: dict[str, _Entry] = {}
        self._names: dict[str, str] = {}
        self._clock = itertools.count(1)

    @property
    def names(self) -> dict[str, AdapterVersion]:
        """The known versions by name."""
        return {name: self._entries[version].version for name, version in self._names.items()}

    @property
    def resident(self) -> list[str]:
        """The versions that are loaded."""
        return [id for id, entry in self._entries.items() if entry.resident]

    def version(self, id: str) -> AdapterVersion:
        """A version by its id."""
        return self._entries[id].version

    def bind(self, name: str, version: AdapterVersion) -> None:
        """Let a name mean a version from now on; requests keep the one that they came with."""
        self._unname(name)
        entry = self._entries.setdefault(version.id, _Entry(version))
        entry.names.add(name)
        self._names[name] = version.id

    def forget(self, name: str) -> None:
        """Drop a name: gone at once for new requests. Raises AdapterNameError for an unknown one."""
        if name not in self._names:
            raise AdapterNameError(f"no adapter {name!r}; known: {sorted(self._names)}")
        self._unname(name)

    def pin(self, name: str) -> None:
        """Keep what a name means loaded, once it is. Raises AdapterNameError for an unknown one."""
        self._set_pinned(name, True)

    def unpin(self, name: str) -> None:
        """Let what a name means go out again when others need its place."""
        self._set_pinned(name, False)

    def enter(self, id: str) -> None:
        """A request comes that will need the version."""
        self._entries[id].waiting += 1

    def leave(self, id: str) -> None:
        """A request goes that was waiting for the version; undoes `enter`."""
        self._entries[id].waiting -= 1

    def acquire(self, id: str) -> None:
        """A waiting request enters the batch; the version must be `ready`."""
        entry = self._entries[id]
        entry.waiting, entry.running, entry.used = entry.waiting - 1, entry.running + 1, next(self._clock)

    def release(self, id: str) -> None:
        """A request leaves the batch and waits again."""
        entry = self._entries[id]
        entry.waiting, entry.running = entry.waiting + 1, entry.running - 1

    def is_resident(self, id: str) -> bool:
        """Return True if a version is loaded."""
        return self._entries[id].resident

    def may_act(self, id: str) -> bool:
        """Return True if a request of this version may enter the batch beside the versions that are in it."""
        acting = {key for key, entry in self._entries.items() if entry.running}
        return id in acting or self.n_acting is None or len(acting) < self.n_acting

    def next_load(self, wanted: Iterable[str]) -> tuple[str | None, str | None]:
        """The first of the wanted versions (oldest request first) that is not loaded and gets a place, and which
        version has to go for it.

        What older requests want stays. (None, None) where all is loaded or nothing can go.
        """
        kept: set[str] = set()
        for id in wanted:
            if self._entries[id].resident:
                kept.add(id)
                continue
            if self.n_resident is None or len(self.resident) < self.n_resident:
                return id, None
            victim = self._victim(kept)
            return (None, None) if victim is None else (id, victim)
        return None, None

    def loaded(self, id: str) -> None:
        """A version's weights are there."""
        self._entries[id].resident = True
        self._entries[id].used = next(self._clock)

    def unloaded(self, id: str) -> None:
        """A version's weights are gone."""
        entry = self._entries[id]
        entry.resident = False
        self._drop_if_unknown(entry)

    def failed(self, id: str) -> None:
        """A version cannot be loaded: its names go, so that the next request looks at the files again."""
        for name in list(self._entries[id].names):
            self._unname(name)

    def unneeded(self) -> list[str]:
        """Loaded versions that no name means and no request needs."""
        return [id for id in self.resident if not self._is_needed(self._entries[id])]

    def tidy(self) -> None:
        """Forget versions that are not loaded, and that no name means and no request needs."""
        for entry in list(self._entries.values()):
            self._drop_if_unknown(entry)

    def _victim(self, kept: set[str]) -> str | None:
        free = [e for e in self._entries.values() if e.resident and not e.running and not e.pinned]
        free = [e for e in free if e.version.id not in kept]
        return min(free, key=lambda e: e.used).version.id if free else None

    def _unname(self, name: str) -> None:
        id = self._names.pop(name, None)
        if id is not None:
            entry = self._entries[id]
            entry.names.discard(name)
            entry.pinned = entry.pinned and bool(entry.names)
            self._drop_if_unknown(entry)

    def _drop_if_unknown(self, entry: _Entry) -> None:
        if not entry.resident and not self._is_needed(entry):
            self._entries.pop(entry.version.id, None)

    def _is_needed(self, entry: _Entry) -> bool:
        return bool(entry.names or entry.waiting or entry.running)

    def _set_pinned(self, name: str, pinned: bool) -> None:
        if name not in self._names:
            raise AdapterNameError(f"no adapter {name!r}; known: {sorted(self._names)}")
        self._entries[self._names[name]].pinned = pinned
