"""Adapters to load before any request needs them, and the callers that wait for this. No torch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from veneer.errors import ConfigError, VeneerError
from veneer.plain.lru import LruCache
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest


@dataclass(frozen=True, slots=True, eq=False)
class Preload:
    """Request to load an adapter version, register it under the name of ``request``, and pin it if ``pins``.

    The future ``told`` completes when that is done, or with an error.
    """

    request: LoRARequest
    version: AdapterVersion
    pins: bool
    told: Future[None] = field(default_factory=Future)


class Preloads:
    """Preloads by adapter version. Each counts in the pool as a request that waits, so that its version stays known.

    ``adapters`` are the named adapters. ``dropped`` gives, for each removed name, the highest request number that may
    no longer register it.
    """

    def __init__(self, pool: AdapterPool, adapters: dict[str, LoRARequest], dropped: LruCache[str, int]) -> None:
        self._pool, self._adapters, self._dropped = pool, adapters, dropped
        self._wanted: dict[str, list[Preload]] = {}

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def add(self, preload: Preload) -> None:
        """Queue a preload, unless its future was cancelled."""
        if not preload.told.set_running_or_notify_cancel():
            return
        id = preload.version.id
        self._pool.know(preload.version)
        self._pool.hold(id)
        self._wanted.setdefault(id, []).append(preload)
        if self._pool.is_resident(id):
            self.end(id)

    def begin_load(self) -> str | None:
        """Begin to load the first version that is not loaded, and return it. Return None if there is none, or no room
        for it.
        """
        return self._pool.begin_load(self._wanted)

    def end(self, id: str, error: VeneerError | None = None) -> None:
        """Complete the preloads of a version, which will be loaded by the next step; or fail them with ``error``."""
        for preload in self._wanted.pop(id, ()):
            if error is None:
                self._name(preload)
            self._pool.leave(id)
            preload.told.set_result(None) if error is None else preload.told.set_exception(error)

    def give_up(self, *, barred: bool = False) -> None:
        """Fail all preloads for lack of room.

        If ``barred``, fail only those for which pinned adapters leave no room.
        """
        for id in [id for id in self._wanted if not barred or self._pool.is_barred(id)]:
            self.end(id, self.no_place())

    def no_place(self) -> ConfigError:
        """Return the error of an adapter for which there is no room."""
        return ConfigError(f"cannot load the adapter: {self._pool.told_places()}")

    def _name(self, preload: Preload) -> None:
        name = preload.request.name
        if preload.request.adapter_id <= (self._dropped.get(name) or 0):  # while it was loaded
            return
        self._pool.bind(name, preload.version)
        self._adapters[name] = preload.request
        if preload.pins:
            self._pool.pin(name)
