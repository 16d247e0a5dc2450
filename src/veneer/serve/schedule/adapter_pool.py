"""Pool of adapters: versions by name, their loading, and the choice of versions to evict. No torch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

from veneer.errors import AdapterNameError, ConfigError
from veneer.serve.schedule.adapter_counts import OTHER, AdapterCount, AdapterCounts
from veneer.serve.schedule.adapter_version import AdapterUsage, AdapterVersion, Residency
from veneer.serve.schedule.eviction import Eviction
from veneer.serve.schedule.lazy_heap import LazyHeap
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.pool_entry import PoolEntry
from veneer.serve.schedule.sized_group import SizedGroup

_AHEAD = 2  # loads begun at once, so that the loader has the next when it ends one
_TOLD = 10  # names in a message


class AdapterPool:
    """Adapters by name, the versions that the names refer to, and the loaded versions.

    At most ``n_resident`` versions are loaded, and at most ``n_acting`` are in one batch; None is no limit. A version's
    bytes are lent by ``memory`` from the moment that its load begins. Invariants:

    - A version with requests in the batch, or pinned, is not evicted.
    - At most ``n_resident`` versions are loaded or loading, and the lent bytes are theirs.
    - A version without a name and without requests is removed, with its cached pages.
    - Every load that begins is `loaded`, `failed` or `abandoned`.
    - Two names of equal content are one version.

    No call searches all versions: each version is in the groups of its state.
    """

    def __init__(self, n_resident: int | None = None, n_acting: int | None = None, memory: Pages | None = None) -> None:
        limits = [n for n in (n_resident, n_acting) if n is not None]
        if any(n < 1 for n in limits):
            raise ConfigError(f"at most {limits} adapters loaded and in a batch: there must be room for one")
        self.n_resident, self.n_acting, self.memory = n_resident, n_acting, memory
        self.going: deque[str] = deque()
        """Evicted versions. The runner must unload them before it loads or runs anything."""
        self.moved: dict[str, None] = {}
        """Versions that were loaded or evicted, or entered or left the batch, since the queues last read this."""
        self.counts = AdapterCounts()
        self._entries: dict[str, PoolEntry] = {}
        self._names: dict[str, str] = {}
        self._pins: set[str] = set()  # names
        groups = (SizedGroup[PoolEntry]() for _ in range(7))
        self._resident, self._loading, self._acting, self._pinned, self._unneeded, self._free, self._awaited = groups
        # The last two hold idle ones: nobody waits for them, or somebody does.
        self._idle: LazyHeap[PoolEntry] = LazyHeap(lambda entry: entry.rank)
        self._worth = Eviction() if memory is None else memory.worth
        self._clock = itertools.count(1)

    @property
    def names(self) -> dict[str, AdapterVersion]:
        """Known versions by name."""
        return {name: self._entries[version].version for name, version in self._names.items()}

    @property
    def resident(self) -> list[str]:
        """Versions that are loaded."""
        return list(self._resident.entries)

    @property
    def loading(self) -> list[str]:
        """Versions that are loading."""
        return list(self._loading.entries)

    @property
    def acting(self) -> list[str]:
        """Versions with requests in the batch. Any thread may ask."""
        return list(self._acting.entries)

    @property
    def n_loaded(self) -> int:
        """Number of loaded versions."""
        return len(self._resident)

    @property
    def n_in_batch(self) -> int:
        """Number of versions with requests in the batch."""
        return len(self._acting)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned versions."""
        return self._pinned.n_bytes

    @property
    def known(self) -> frozenset[str]:
        """Versions that have an entry in the pool."""
        return frozenset(self._entries)

    def is_barred(self, id: str) -> bool:
        """Return True if a version is not loaded, and pinned versions leave no room for it, even if all others are
        evicted.
        """
        entry = self._entries[id]
        if entry.residency is not Residency.ABSENT:
            return False
        held = [each.n_bytes for each in self._pinned.entries.values() if each.residency is not Residency.ABSENT]
        if self.n_resident is not None and len(held) >= self.n_resident:
            return True
        return self.memory is not None and entry.n_bytes > self.memory.n_bytes - sum(held)

    def told_places(self) -> str:
        """Return a text for errors: how many versions are loaded and pinned, and the limits on their number and
        bytes.
        """
        n_pinned = sum(entry.residency is Residency.RESIDENT for entry in self._pinned.entries.values())
        said = f"{len(self._resident)} adapters are loaded, {n_pinned} of them pinned"
        if self.n_resident is not None:
            said += f", of at most {self.n_resident} (max_cpu_loras, max_loras)"
        if self.memory is not None:
            said += f". They take {self.memory.n_lent} of the {self.memory.n_bytes} bytes for keys, values and adapters"
        return f"{said}. Unpin adapters, or raise the limits"

    def version(self, id: str) -> AdapterVersion:
        """Return a version by its id."""
        return self._entries[id].version

    def names_of(self, id: str) -> list[str]:
        """Return the names of a version; none for an unknown one. Any thread may call it."""
        entry = self._entries.get(id)
        return [] if entry is None else sorted(entry.names)

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes of the loaded versions by their names. Any thread may call it."""
        return {name: entry.n_bytes for entry in list(self._resident.entries.values()) for name in tuple(entry.names)}

    def count(self, name: str) -> AdapterCount:
        """Return the counts of a name. Unknown names and mixes, of which clients can invent any number, share one
        count.
        """
        id = self._names.get(name)
        return self.counts.of(OTHER if id is None or self._entries[id].version.parts else name)

    def is_known(self, id: str) -> bool:
        """Return True if a version has an entry in the pool."""
        return id in self._entries

    def is_needed(self, id: str) -> bool:
        """Return True if a name refers to a version, or a request needs it."""
        return id in self._entries and self._entries[id].is_needed

    def bind(self, name: str, version: AdapterVersion) -> None:
        """Bind a name to a version, which is known from then on. Earlier requests keep their version."""
        if self._names.get(name) != version.id:
            self._unname(name)
        self.know(version)
        entry = self._entries[version.id]
        entry.names.add(name)
        entry.pinned = entry.pinned or name in self._pins
        self._names[name] = version.id
        self._sort(entry)

    def know(self, version: AdapterVersion) -> None:
        """Add a version to the pool. It stays there as long as a name refers to it or a request needs it.

        A version that is not loaded is read from the folder given last, since an earlier folder may be gone.
        """
        entry = self._entries.setdefault(version.id, PoolEntry(version, version.n_bytes))
        if entry.residency is Residency.ABSENT:
            entry.version = version

    def forget(self, name: str) -> None:
        """Drop a name, at once for new requests. Raises AdapterNameError for an unknown one."""
        self._require_known(name)
        self._pins.discard(name)
        self._unname(name)
        self.counts.forget(name)

    def pin(self, name: str) -> None:
        """Keep the version of a name loaded from the moment that it is loaded, and later versions of the name likewise.

        Raises AdapterNameError for an unknown name.
        """
        self._require_known(name)
        self._pins.add(name)
        self._set_pinned(name)

    def unpin(self, name: str) -> None:
        """Allow the version of a name to be evicted again, unless another name of it is pinned.

        Raises AdapterNameError for an unknown name.
        """
        self._require_known(name)
        self._pins.discard(name)
        self._set_pinned(name)

    def state(self, name: str) -> AdapterUsage | None:
        """Return the state of a name's version; None for an unknown name."""
        return self.state_of(self._names.get(name, ""))

    def state_of(self, id: str) -> AdapterUsage | None:
        """Return the state of a version; None for an unknown one."""
        entry = self._entries.get(id)
        if entry is None:
            return None
        return AdapterUsage(
            version=entry.version, n_bytes=entry.n_bytes, residency=entry.residency, pinned=entry.pinned,
            n_requests=entry.n_requests, n_hits=entry.n_hits,
        )  # fmt: skip

    def enter(self, id: str) -> None:
        """Count a new request that waits for the version."""
        entry = self._entries[id]
        entry.n_requests += 1
        entry.n_hits += entry.residency is Residency.RESIDENT
        self.hold(id)

    def hold(self, id: str) -> None:
        """Count a caller that waits for the version without a request. `leave` removes it."""
        self._count(id, 1, 0)

    def leave(self, id: str) -> None:
        """Remove a request, or another caller, that waits for the version. It undoes `enter` and `hold`."""
        self._count(id, -1, 0)

    def acquire(self, id: str) -> None:
        """Move a waiting request of the version into the batch; the version must be resident."""
        self._count(id, -1, 1)

    def release(self, id: str) -> None:
        """Move a request of the version from the batch back to the waiting ones."""
        self._count(id, 1, -1)

    def is_resident(self, id: str) -> bool:
        """Return True if a version is loaded."""
        return self._entries[id].residency is Residency.RESIDENT

    def is_absent(self, id: str) -> bool:
        """Return True if a version is neither loaded nor loading."""
        return self._entries[id].residency is Residency.ABSENT

    def is_acting(self, id: str) -> bool:
        """Return True if a request of the version is in the batch."""
        return self._entries[id].running > 0

    def is_pinned(self, id: str) -> bool:
        """Return True if a version is known and pinned, so that it is never evicted."""
        return id in self._entries and self._entries[id].pinned

    @property
    def is_full(self) -> bool:
        """Return True if the batch admits no adapter version besides those that are in it."""
        return self.n_acting is not None and len(self._acting) >= self.n_acting

    def begin_load(self, wanted: Iterable[str], *, spares_awaited: bool = False) -> str | None:
        """Begin to load the first of the wanted versions (first request first) that is neither loaded nor loading.

        Idle versions and cached pages are evicted for it, the least valuable first, except versions before it in
        ``wanted``. Versions that requests wait for are evicted last, or not at all (``spares_awaited``). Returns None
        if all are loaded or loading, if nothing can be evicted, or if enough versions are loading.
        """
        kept = set[str]()
        for id in wanted:
            entry = self._entries[id]
            if entry.residency is Residency.ABSENT:
                if len(self._loading) >= _AHEAD or not self._finds_place(entry, kept, spares_awaited):
                    return None
                entry.residency = Residency.LOADING
                self._sort(entry, moved=True)
                return id
            kept.add(id)
        return None

    def will_load(self, id: str) -> bool:
        """Return True if a version that is not loaded is loading, or could load without a request leaving the batch."""
        entry = self._entries[id]
        return entry.residency is Residency.LOADING or self._suffice(*self._lacking(entry), (), False)

    def lacks_bytes(self, id: str) -> bool:
        """Return True if a version is absent and evicting all idle versions would free too few bytes for it."""
        entry = self._entries[id]
        if self.memory is None or entry.residency is not Residency.ABSENT:
            return False
        return entry.n_bytes > self.memory.lendable + self._free.n_bytes + self._awaited.n_bytes

    def settle(self, id: str, n_bytes: int) -> bool:
        """Set the actual size in bytes of a version whose load has ended. Return False if the version does not fit.

        Idle versions are evicted for it. If it does not fit, its state is absent again, and the next load expects this
        size.
        """
        entry = self._entries[id]
        self._give_back(entry.n_bytes)
        for group in (self._loading, self._pinned):
            group.set(id, entry, False)
        entry.n_bytes, entry.residency = n_bytes, Residency.ABSENT
        fits = self._finds_place(entry)
        if fits:
            entry.residency = Residency.LOADING
        self._sort(entry, moved=True)
        return fits

    def loaded(self, id: str, seconds: float = 0.0) -> None:
        """Mark a version as loaded; its load took ``seconds``."""
        entry = self._entries[id]
        entry.residency, entry.seconds, entry.n_uses = Residency.RESIDENT, seconds, 0
        self._used(entry)
        self._sort(entry, moved=True)
        for name in entry.names:
            count = self.count(name)
            count.n_loads += 1
            count.load_seconds += seconds

    def abandoned(self, id: str) -> None:
        """End a load without a result, since no request needs the version any more."""
        self._absent(self._entries[id])

    def failed(self, id: str) -> None:
        """Note that a version cannot be loaded, and drop its names, so that the next request reads the files again."""
        entry = self._entries[id]
        for name in list(entry.names):
            self.forget(name)
        self._absent(entry)

    def can_make_room(
        self,
        holder: Hashable,
        n_positions: int,
        kept: Collection[str] = (),
        *,
        keys: Sequence[bytes] = (),
        spares_awaited: bool = False,
    ) -> bool:
        """Return True if `make_room` would succeed after the holder has begun its table with the shared blocks of
        ``keys``.
        """
        if self.memory is None:
            return True
        lacking = self.memory.lacking(holder, n_positions, keys)
        return lacking is not None and self._suffice(0, lacking, kept, spares_awaited)

    def make_room(
        self, holder: Hashable, n_positions: int, kept: Collection[str] = (), *, spares_awaited: bool = False
    ) -> bool:
        """Evict until a holder's table can grow to ``n_positions``. If it cannot, return False and evict nothing.

        Idle versions and cached pages of the least value are evicted first. Versions that are ``kept`` are never
        evicted. Versions for which requests wait are evicted last; with ``spares_awaited``, never.
        """
        memory = self.memory
        if memory is None:
            return True
        if not self.can_make_room(holder, n_positions, kept, spares_awaited=spares_awaited):
            return False
        self._evict(0, lambda: memory.has_free(holder, n_positions), lambda: memory.lacks_bytes, kept)
        return True

    def tidy(self) -> None:
        """Evict versions that have no name and no request."""
        for entry in list(self._unneeded.entries.values()):
            if entry.residency is Residency.RESIDENT:
                self._go(entry)
            self._drop_if_unknown(entry)

    def _count(self, id: str, waiting: int, running: int) -> None:
        entry = self._entries[id]
        acted = entry.running > 0
        entry.waiting, entry.running = entry.waiting + waiting, entry.running + running
        entry.n_uses += running > 0
        if acted and not entry.running:
            self._used(entry)
        self._sort(entry, moved=acted != (entry.running > 0))

    def _sort(self, entry: PoolEntry, *, moved: bool = False) -> None:
        """Put an adapter version into the groups of its state (loaded, loading, idle, …), and out of the others."""
        id, needed, idle = entry.version.id, entry.is_needed, entry.is_idle
        self._resident.set(id, entry, entry.residency is Residency.RESIDENT)
        self._loading.set(id, entry, entry.residency is Residency.LOADING)
        self._acting.set(id, entry, entry.running > 0)
        self._pinned.set(id, entry, entry.pinned)
        self._unneeded.set(id, entry, not needed and entry.residency is not Residency.LOADING)
        self._free.set(id, entry, idle and not entry.waiting)
        self._awaited.set(id, entry, idle and entry.waiting > 0)
        self._idle.put(entry)
        if moved:
            self.moved[id] = None

    def _lacking(self, entry: PoolEntry) -> tuple[int, int]:
        """Return how many adapter versions must be evicted, and how many bytes freed, to load the version ``entry``.

        Numbers of at most 0 mean that there is room.
        """
        n_there = len(self._resident) + len(self._loading)
        n_over = 0 if self.n_resident is None else n_there + 1 - self.n_resident
        return n_over, 0 if self.memory is None else entry.n_bytes - self.memory.lendable

    def _finds_place(self, entry: PoolEntry, kept: Collection[str] = (), spares_awaited: bool = False) -> bool:
        """Evict enough to load an adapter version, and reserve its bytes.

        If this is impossible, evict nothing and return False.
        """
        lacking = self._lacking(entry)
        if not self._suffice(*lacking, kept, spares_awaited):
            return False
        memory, n_bytes = self.memory, entry.n_bytes
        self._evict(lacking[0], lambda: memory is None or memory.free_bytes >= n_bytes, lambda: True, kept)
        if memory is not None:
            memory.lend(n_bytes)
        return True

    def _suffice(self, n: int, n_bytes: int, kept: Collection[str], spares_awaited: bool) -> bool:
        """Return True if evicting idle versions, except the ``kept`` ones, frees ``n`` slots and ``n_bytes``."""
        groups = (self._free,) if spares_awaited else (self._free, self._awaited)
        spared = [entry for group in groups for id in kept if (entry := group.entries.get(id)) is not None]
        n_spared, spared_bytes = len(spared), sum(entry.n_bytes for entry in spared)
        return (
            n <= sum(map(len, groups)) - n_spared and n_bytes <= sum(group.n_bytes for group in groups) - spared_bytes
        )

    def _evict(
        self, n: int, is_enough: Callable[[], bool], bytes_help: Callable[[], bool], kept: Collection[str]
    ) -> None:
        """Evict at least ``n`` idle versions, then the least valuable entries until ``is_enough()``.

        After the first ``n``, cached pages are evicted too. Idle versions are then evicted only while ``bytes_help()``
        returns True. Versions that requests wait for are evicted last, and versions in ``kept`` never. The caller has
        checked that enough can be evicted.
        """
        spared = list[PoolEntry]()
        while n > 0 or not is_enough():
            entry = self._idle.first()
            if entry is not None and entry.version.id in kept:
                self._idle.discard(entry)
                spared.append(entry)
                continue
            page = None if n > 0 or self.memory is None else self.memory.least
            if entry is not None and (
                page is None or (bytes_help() and (entry.waiting > 0, entry.worth) < (False, page))
            ):
                for name in entry.names:
                    self.count(name).n_evictions += 1
                self._go(entry)
                n -= 1
            elif self.memory is not None:
                self.memory.evict()
        for entry in spared:
            self._idle.put(entry)

    def _used(self, entry: PoolEntry) -> None:
        entry.used = next(self._clock)
        entry.worth = self._worth.of(max(1, entry.n_uses), entry.seconds, entry.n_bytes)

    def _go(self, entry: PoolEntry) -> None:
        self.going.append(entry.version.id)
        self._worth.went(entry.worth)
        self._absent(entry)

    def _absent(self, entry: PoolEntry) -> None:
        if entry.residency is not Residency.ABSENT:
            self._give_back(entry.n_bytes)
        entry.residency = Residency.ABSENT
        self._sort(entry, moved=True)
        self._drop_if_unknown(entry)

    def _give_back(self, n_bytes: int) -> None:
        if self.memory is not None:
            self.memory.give_back(n_bytes)

    def _unname(self, name: str) -> None:
        id = self._names.pop(name, None)
        if id is not None:
            entry = self._entries[id]
            entry.names.discard(name)
            entry.pinned = not self._pins.isdisjoint(entry.names)
            self._sort(entry)
            self._drop_if_unknown(entry)

    def _drop_if_unknown(self, entry: PoolEntry) -> None:
        if entry.residency is Residency.ABSENT and not entry.is_needed:
            self._entries.pop(entry.version.id, None)
            self._unneeded.set(entry.version.id, entry, False)
            self._idle.discard(entry)
            self.moved.pop(entry.version.id, None)
            if self.memory is not None:
                self.memory.forget(entry.version.id)

    def _set_pinned(self, name: str) -> None:
        entry = self._entries[self._names[name]]
        entry.pinned = not self._pins.isdisjoint(entry.names)
        self._sort(entry)

    def _require_known(self, name: str) -> None:
        if name not in self._names:
            more = f" and {len(self._names) - _TOLD:,} more" if len(self._names) > _TOLD else ""
            raise AdapterNameError(f"no adapter {name!r}; known: {sorted(itertools.islice(self._names, _TOLD))}{more}")
