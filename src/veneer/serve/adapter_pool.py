"""Pool of adapters: versions by name, their loading, and the choice of versions to evict. No torch."""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from veneer.errors import AdapterNameError, ConfigError
from veneer.serve.pages import Pages

_AHEAD = 2  # loads begun at once, so that the loader has the next when it ends one


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """Content of an adapter's files; ``id`` is derived from it, so that equal files are one version.

    ``n_front`` counts its virtual tokens. ``rank`` is the largest of its low-rank parts, 0 if it has none. ``n_bytes``
    is its expected size when loaded. A mix has no folder, but versions with their weights.
    """

    id: str
    folder: str = ""
    kind: str = ""
    rank: int = 0
    n_front: int = 0
    n_bytes: int = 0
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


@dataclass(eq=False, slots=True)
class _Entry:
    version: AdapterVersion
    n_bytes: int
    names: set[str] = field(default_factory=set)
    waiting: int = 0  # requests that will need it, those in the batch not counted
    running: int = 0
    pinned: bool = False
    residency: Residency = Residency.ABSENT
    used: int = 0

    @property
    def is_needed(self) -> bool:
        return bool(self.names or self.waiting or self.running)


class AdapterPool:
    """Names, the versions that they refer to, and the loaded versions.

    At most ``n_resident`` versions are loaded, and at most ``n_acting`` are in one batch; None is no limit. ``memory``
    lends their bytes, from the moment that a load begins. Invariants:
    - A version with requests in the batch, or pinned, is not evicted.
    - At most ``n_resident`` versions are loaded or loading, and the lent bytes are theirs.
    - A version without a name and without requests is removed.
    - Every load that begins is `loaded`, `failed` or `abandoned`.
    - Two names of equal content are one version.
    """

    def __init__(self, n_resident: int | None = None, n_acting: int | None = None, memory: Pages | None = None) -> None:
        limits = [n for n in (n_resident, n_acting) if n is not None]
        if any(n < 1 for n in limits):
            raise ConfigError(f"at most {limits} adapters loaded and in a batch: there must be room for one")
        self.n_resident, self.n_acting, self.memory = n_resident, n_acting, memory
        self.going: deque[str] = deque()
        """Versions that went out, which the runner is to unload before anything is loaded or run."""
        self._entries: dict[str, _Entry] = {}
        self._names: dict[str, str] = {}
        self._clock = itertools.count(1)

    @property
    def names(self) -> dict[str, AdapterVersion]:
        """Known versions by name."""
        return {name: self._entries[version].version for name, version in self._names.items()}

    @property
    def resident(self) -> list[str]:
        """Versions that are loaded."""
        return self._in(Residency.RESIDENT)

    @property
    def loading(self) -> list[str]:
        """Versions that are loading."""
        return self._in(Residency.LOADING)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned versions."""
        return sum(entry.n_bytes for entry in list(self._entries.values()) if entry.pinned)

    @property
    def known(self) -> frozenset[str]:
        """Versions that have an entry in the pool."""
        return frozenset(self._entries)

    def told_places(self) -> str:
        """Return a text for errors: how many versions are loaded and pinned, and the limits of number and bytes."""
        pinned = [entry for entry in self._entries.values() if entry.pinned]
        said = f"{len(self.resident)} adapters are loaded, {len(pinned)} of them pinned"
        if self.n_resident is not None:
            said += f", and there is room for {self.n_resident} in number (max_cpu_loras, max_loras)"
        if self.memory is not None:
            said += f"; they take {self.memory.n_lent} bytes of the {self.memory.n_bytes} for keys, values and adapters"
        return f"{said}: unpin adapters, or raise the limits"

    def version(self, id: str) -> AdapterVersion:
        """Return a version by its id."""
        return self._entries[id].version

    def is_needed(self, id: str) -> bool:
        """Return True if a name refers to a version, or a request needs it."""
        return id in self._entries and self._entries[id].is_needed

    def bind(self, name: str, version: AdapterVersion) -> None:
        """Bind a name to a version from now on; earlier requests keep their version.

        A version that is not loaded is read from the folder given last, since an earlier folder may be gone.
        """
        self._unname(name)
        entry = self._entries.setdefault(version.id, _Entry(version, version.n_bytes))
        if entry.residency is Residency.ABSENT:
            entry.version = version
        entry.names.add(name)
        self._names[name] = version.id

    def forget(self, name: str) -> None:
        """Drop a name, at once for new requests. Raises AdapterNameError for an unknown one."""
        if name not in self._names:
            raise AdapterNameError(f"no adapter {name!r}; known: {sorted(self._names)}")
        self._unname(name)

    def pin(self, name: str) -> None:
        """Keep the version of a name loaded, once it is. Raises AdapterNameError for an unknown one."""
        self._set_pinned(name, True)

    def unpin(self, name: str) -> None:
        """Allow the version of a name to be evicted again. Raises AdapterNameError for an unknown one."""
        self._set_pinned(name, False)

    def enter(self, id: str) -> None:
        """Count a new request that waits for the version."""
        self._entries[id].waiting += 1

    def leave(self, id: str) -> None:
        """Remove a request that waited for the version; undoes `enter`."""
        self._entries[id].waiting -= 1

    def acquire(self, id: str) -> None:
        """Move a waiting request of the version into the batch; the version must be resident."""
        entry = self._entries[id]
        entry.waiting, entry.running, entry.used = entry.waiting - 1, entry.running + 1, next(self._clock)

    def release(self, id: str) -> None:
        """Move a request of the version from the batch back to the waiting ones."""
        entry = self._entries[id]
        entry.waiting, entry.running = entry.waiting + 1, entry.running - 1

    def is_resident(self, id: str) -> bool:
        """Return True if a version is loaded."""
        return self._entries[id].residency is Residency.RESIDENT

    def is_pinned(self, id: str) -> bool:
        """Return True if a version is pinned, so that it is never evicted."""
        return self._entries[id].pinned

    def may_act(self, id: str) -> bool:
        """Return True if a request of this version may enter the batch with the versions that are in it."""
        acting = {key for key, entry in self._entries.items() if entry.running}
        return id in acting or self.n_acting is None or len(acting) < self.n_acting

    def begin_load(self, wanted: Iterable[str]) -> str | None:
        """Begin to load the first of the wanted versions (oldest request first) that is neither loaded nor loading.

        Idle versions are evicted for it, least recently used first, except those that older requests want. Returns None
        if all are loaded or loading, if nothing can be evicted, or if enough versions are loading.
        """
        kept = set[str]()
        for id in wanted:
            entry = self._entries[id]
            if entry.residency is Residency.ABSENT:
                victims = self._victims(entry, kept)
                if victims is None or len(self.loading) >= _AHEAD:
                    return None
                self._evict(victims)
                self._lend(entry.n_bytes)
                entry.residency = Residency.LOADING
                return id
            kept.add(id)
        return None

    def will_load(self, id: str) -> bool:
        """Return True if an absent version is loading, or could load without a request leaving the batch."""
        entry = self._entries[id]
        return entry.residency is Residency.LOADING or self._victims(entry, ()) is not None

    def lacks_bytes(self, id: str) -> bool:
        """Return True if a version is absent and evicting all idle versions would free too few bytes for it."""
        entry = self._entries[id]
        if self.memory is None or entry.residency is not Residency.ABSENT:
            return False
        return entry.n_bytes > self.memory.lendable + sum(e.n_bytes for e in self._idle(()))

    def settle(self, id: str, n_bytes: int) -> bool:
        """Set the bytes of a version whose load has ended; return False if it does not fit.

        Idle versions are evicted for it. If it does not fit, it is absent again, with its actual size as the expected
        one.
        """
        entry = self._entries[id]
        self._give_back(entry.n_bytes)
        entry.n_bytes, entry.residency = n_bytes, Residency.ABSENT
        victims = self._victims(entry, ())
        if victims is None:
            return False
        self._evict(victims)
        self._lend(n_bytes)
        entry.residency = Residency.LOADING
        return True

    def loaded(self, id: str) -> None:
        """Mark a version as loaded, whose load was begun."""
        entry = self._entries[id]
        entry.residency, entry.used = Residency.RESIDENT, next(self._clock)

    def abandoned(self, id: str) -> None:
        """End a load without a result, since no request needs the version any more."""
        self._absent(self._entries[id])

    def failed(self, id: str) -> None:
        """Drop the names of a version that cannot be loaded, so that the next request reads the files again."""
        entry = self._entries[id]
        for name in list(entry.names):
            self._unname(name)
        self._absent(entry)

    def give_way(self, n_bytes: int, kept: Collection[str] = ()) -> bool:
        """Evict idle versions until so many bytes are free; return False, and evict none, if they are too few."""
        chosen = list[_Entry]()
        for entry in self._idle(kept):
            if sum(e.n_bytes for e in chosen) >= n_bytes:
                break
            chosen.append(entry)
        if sum(e.n_bytes for e in chosen) < n_bytes:
            return False
        self._evict(chosen)
        return True

    def tidy(self) -> None:
        """Evict versions that have no name and no request."""
        for entry in [e for e in self._entries.values() if not e.is_needed]:
            if entry.residency is Residency.RESIDENT:
                self._evict([entry])
            self._drop_if_unknown(entry)

    def _in(self, residency: Residency) -> list[str]:
        return [id for id, entry in self._entries.items() if entry.residency is residency]

    def _idle(self, kept: Collection[str]) -> list[_Entry]:
        """The loaded versions that may go out: those that nobody waits for first, then those used longest ago."""
        found = [e for e in self._entries.values() if e.residency is Residency.RESIDENT]
        free = [e for e in found if not e.running and not e.pinned and e.version.id not in kept]
        return sorted(free, key=lambda e: (e.waiting > 0, e.used))

    def _victims(self, entry: _Entry, kept: Collection[str]) -> list[_Entry] | None:
        """The versions that have to go before one has a place; None where those that may go are too few."""
        n_there = len(self.resident) + len(self.loading)
        n_over = 0 if self.n_resident is None else n_there + 1 - self.n_resident
        lacking = 0 if self.memory is None else entry.n_bytes - self.memory.lendable
        chosen = list[_Entry]()
        for victim in self._idle(kept):
            if len(chosen) >= n_over and lacking <= 0:
                break
            chosen.append(victim)
            lacking -= victim.n_bytes
        return chosen if len(chosen) >= n_over and lacking <= 0 else None

    def _evict(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            self.going.append(entry.version.id)
            self._absent(entry)

    def _absent(self, entry: _Entry) -> None:
        if entry.residency is not Residency.ABSENT:
            self._give_back(entry.n_bytes)
        entry.residency = Residency.ABSENT
        self._drop_if_unknown(entry)

    def _lend(self, n_bytes: int) -> None:
        if self.memory is not None:
            self.memory.lend(n_bytes)

    def _give_back(self, n_bytes: int) -> None:
        if self.memory is not None:
            self.memory.give_back(n_bytes)

    def _unname(self, name: str) -> None:
        id = self._names.pop(name, None)
        if id is not None:
            entry = self._entries[id]
            entry.names.discard(name)
            entry.pinned = entry.pinned and bool(entry.names)
            self._drop_if_unknown(entry)

    def _drop_if_unknown(self, entry: _Entry) -> None:
        if entry.residency is Residency.ABSENT and not entry.is_needed:
            self._entries.pop(entry.version.id, None)

    def _set_pinned(self, name: str, pinned: bool) -> None:
        if name not in self._names:
            raise AdapterNameError(f"no adapter {name!r}; known: {sorted(self._names)}")
        self._entries[self._names[name]].pinned = pinned
