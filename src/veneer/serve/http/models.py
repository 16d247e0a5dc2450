"""Served models: the base, the adapters in a folder, and adapters loaded over HTTP."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.plain.lru import LruCache
from veneer.plain.nearest import nearest
from veneer.serve.engine import Engine
from veneer.serve.http.errors import ModelNotFoundError
from veneer.serve.http.folder import AdapterFolder, is_adapter, is_entry
from veneer.serve.http.key import ANYBODY, CALLER, Key
from veneer.serve.schedule.lora_request import LoRARequest

_MIXES = 64  # clients may think of any number of weights
_VIEWS = 64  # lists of names that keys see
_LONGEST = 256  # characters of an unknown name that are compared, and told
_COMPARED, _TOLD = 1000, 10  # names, for the nearest of them, and in a message; /v1/models lists them all
MIX = "mix/"
"""Prefix of the names of mixes that the body of a request describes."""


@dataclass(frozen=True)
class Loaded:
    """Adapter that was loaded over HTTP: its folder, or a mix's weights by name. ``hub``: its id on the hub."""

    folder: Path | None = None
    weights: Mapping[str, float] | None = None
    hub: str | None = None

    @property
    def source(self) -> str:
        """Kind of source."""
        return "path" if self.hub is None and self.weights is None else "hub" if self.weights is None else "mix"


class Catalogue:
    """Base under ``names``, the adapters in a folder, and adapters loaded over HTTP.

    Adapters in the folder are named after their subfolders (`AdapterFolder`). A request reads the files of its adapter
    alone, so its cost does not depend on their number. The key of the current request (`CALLER`; ``otherwise`` if there
    is none) sees only the adapters that it allows. Any thread may call it.

    A mix in a body has no folder. The last 64 mixes are kept by name, so that they may stay loaded.
    """

    def __init__(
        self, engine: Engine, names: Sequence[str], root: str, adapters: Path | None, otherwise: Key = ANYBODY
    ) -> None:
        self._engine, self._names, self._root, self._otherwise = engine, tuple(names), root, otherwise
        self._asked: dict[str, LoRARequest] = {}  # adapters that a request has named
        self._mixes: dict[str, LoRARequest] = {}  # the one that was asked for last at the end
        self._loaded: dict[str, Loaded] = {}
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._created = int(time.time())
        self._all: tuple[tuple[str, ...], int, tuple[str, ...]] = ((), 0, ())
        self._n_changes = 0  # of those that were loaded
        self._views: LruCache[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = LruCache(_VIEWS)
        self._listed: LruCache[tuple[str, ...], tuple[tuple[str, ...], int, bytes]] = LruCache(_VIEWS)
        self._folder = None if adapters is None else AdapterFolder(adapters, self._names, self._forget)

    def start(self) -> None:
        """Watch the folder from now on."""
        if self._folder is not None:
            self._folder.start()

    def stop(self) -> None:
        """Stop watching the folder."""
        if self._folder is not None:
            self._folder.stop()

    def adapters(self) -> dict[str, Path]:
        """Read the folder again, and return all its adapters: name to folder. Forget removed adapters."""
        if self._folder is None:
            return {}
        self._folder.look()
        return {name: self._folder.folder / name for name in self._folder.names}

    def incomplete(self) -> dict[str, str]:
        """Return the visible folders that lack a file of an adapter: name to reason."""
        there = {} if self._folder is None else self._folder.incomplete
        return {name: reason for name, reason in there.items() if self.sees(name)}

    def find(self, name: str | None) -> LoRARequest | None:
        """Return the request for the adapter of a name. Return None if the name is None or the base's.

        Raises ModelNotFoundError for an unknown or hidden name.
        """
        if name is None or name in self._names:
            return None
        found = self._found(name)
        if found is None:
            there = _those_there(name, (*self._names, *self.names()))
            raise ModelNotFoundError(f"no model {name[:_LONGEST]!r}{self._why_not(name)}{there}")
        return found

    def mix(self, weights: Mapping[str, float]) -> LoRARequest:
        """Return the request for a weighted sum of adapters; ``weights`` maps their names to weights.

        Raises ModelNotFoundError, and ConfigError as `LoRARequest.mix` does.
        """
        parts = self._parts(weights)
        with self._lock:
            return self._mixed(parts)

    @property
    def base(self) -> str:
        """First name of the base."""
        return self._names[0]

    @property
    def base_names(self) -> tuple[str, ...]:
        """All names of the base."""
        return self._names

    @property
    def caller(self) -> Key:
        """Key of the current request."""
        return CALLER.get(self._otherwise)

    def has(self, name: str) -> bool:
        """Return True if a name belongs to the base, or to an adapter that the caller sees."""
        return name in self._names or self._found(name) is not None

    def sees(self, name: str) -> bool:
        """Return True if the caller may see an adapter.

        A caller may see a mix only if it may see all its adapters, because the mix's card names them.
        """
        loaded = self._loaded.get(name)
        return all(map(self.caller.sees, (name, *((loaded and loaded.weights) or ()))))

    def names(self) -> tuple[str, ...]:
        """Return the sorted names of the adapters that the caller sees.

        The same tuple object is returned until an adapter is added or removed.
        """
        there, key = self._there(), self.caller
        if key.sees_all:
            return there
        known = self._views.get(key.adapters)
        if known is None or known[0] is not there:
            known = there, tuple(filter(self.sees, there))
            self._views.put(key.adapters, known)
        return known[1]

    def cards(self) -> bytes:
        """Return the answer of ``/v1/models``."""
        names, key, n_warned = self.names(), self.caller, self._engine.versions.n_warned
        known = self._listed.get(key.adapters)
        if known is None or known[0] is not names or known[1] != n_warned:
            cards = [self._card(name, self._root, None) for name in self._names]
            cards += [self._adapter_card(name) for name in names]
            # One by one: a list of thousands in one call would keep the interpreter from all other threads.
            told = ",".join([json.dumps(card, ensure_ascii=False) for card in cards])
            known = names, n_warned, f'{{"object":"list","data":[{told}]}}'.encode()
            self._listed.put(key.adapters, known)
        return known[2]

    def load(self, name: str, loaded: Loaded) -> None:
        """Serve an adapter under a name. The adapter replaces one that was loaded over HTTP under that name before."""
        own = self.owns(name, loaded)
        with self._lock:
            self._asked.pop(name, None)
            self._loaded.pop(name, None)
            if not own:
                self._loaded[name] = loaded
            self._n_changes += 1
        if own and self._folder is not None:
            self._folder.restore(name)
        self._found(name)

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Raises ModelNotFoundError.

        An adapter of the folder is served again after a request to load it, or after its subfolder is removed and
        copied again.
        """
        if name in self._names:
            raise ModelNotFoundError(f"{name!r} is the base, which stays: give the name of an adapter", "lora_name")
        if name not in self._loaded or not self.sees(name):  # what was loaded may have no files any more
            self.find(name)
        with self._lock:
            self._loaded.pop(name, None)
            self._n_changes += 1
        if self._folder is not None and self._folder.has(name):
            self._folder.withdraw(name)
        self._forget({name})
        self._drop(name)

    def hides(self, folder: Path) -> bool:
        """Return True if a path is the folder of an adapter that the caller may not see, or is within such a folder."""
        root = None if self._folder is None else self._folder.folder.resolve()
        if root is None or root not in folder.parents:
            return False
        return not self.caller.sees(folder.relative_to(root).parts[0])

    def owns(self, name: str, loaded: Loaded) -> bool:
        """Return True if a loaded adapter's folder is the subfolder ``name`` of the adapters' folder."""
        if self._folder is None or not is_entry(name):
            return False
        return (self._folder.folder / name).resolve() == loaded.folder

    def in_folder(self, name: str) -> bool:
        """Return True if a served adapter of the folder has that name."""
        return name not in self._loaded and self._folder is not None and self._folder.has(name)

    def request(self, name: str, loaded: Loaded) -> LoRARequest:
        """Return the request for an adapter that is, or will be, loaded under a name. Raises ModelNotFoundError."""
        if loaded.weights is not None:
            return LoRARequest.mix(name, next(self._count), self._parts(loaded.weights))
        return LoRARequest(name, next(self._count), str(loaded.folder))

    def loaded(self, name: str) -> Loaded | None:
        """Return the adapter that was loaded under a name; None for adapters of the folder, and for the base."""
        return self._loaded.get(name)

    def place(self, name: str) -> str:
        """Return where an adapter comes from: its folder, its id on the hub, or the weights of its mix as JSON."""
        loaded = self._loaded.get(name)
        if loaded is not None and loaded.weights is not None:
            return json.dumps(loaded.weights, ensure_ascii=False)
        return str(self.folder(name)) if loaded is None or loaded.hub is None else loaded.hub

    def folder(self, name: str) -> Path:
        """Return the folder of an adapter that is no mix."""
        loaded = self._loaded.get(name)
        if loaded is not None and loaded.folder is not None:
            return loaded.folder
        return Path(name) if self._folder is None else self._folder.folder / name

    def card(self, name: str) -> dict[str, Any]:
        """Return the answer of ``/v1/models/{name}``. Raises ModelNotFoundError."""
        return self._card(name, self._root, None) if self.find(name) is None else self._adapter_card(name)

    def _adapter_card(self, name: str) -> dict[str, Any]:
        """Return an adapter's card, with the newest warning about its folder."""
        card, loaded = self._card(name, self.place(name), self.base), self._loaded.get(name)
        seen = None if loaded is not None and loaded.weights else self._engine.versions.seen(self.folder(name))
        return card if seen is None or not seen.warning else card | {"warning": seen.warning}

    def _card(self, id: str, root: str, parent: str | None) -> dict[str, Any]:
        longest = self._engine.scheduler.limits.max_model_len
        card = {"id": id, "object": "model", "created": self._created, "owned_by": "veneer"}
        return card | {"root": root, "parent": parent, "max_model_len": longest, "permission": []}

    def _there(self) -> tuple[str, ...]:
        """Return the names of all adapters. The tuple is the same object until an adapter is added or removed."""
        names, n_changes = () if self._folder is None else self._folder.names, self._n_changes
        if self._all[:2] != (names, n_changes):
            self._all = names, n_changes, tuple(sorted({*names, *self._loaded})) if self._loaded else names
        return self._all[2]

    def _found(self, name: str) -> LoRARequest | None:
        """Return the request for an adapter after its files were checked. Return None if there is no such adapter, or
        the caller may not see it.
        """
        if not self.caller.sees(name):
            return None
        loaded = self._loaded.get(name)
        if loaded is not None:
            return self._of_loaded(name, loaded)
        if self._folder is None or not self._folder.has(name):
            if name in self._asked:  # asked for while it went
                self._forget({name})
            return None
        with self._lock:
            return self._asked.setdefault(name, self.request(name, Loaded(self._folder.folder / name)))

    def _of_loaded(self, name: str, loaded: Loaded) -> LoRARequest | None:
        """Return the request for a loaded adapter or mix.

        Return None if the folder no longer holds an adapter, or if an adapter of the mix is no longer served.
        """
        if loaded.weights is not None:
            parts = [(self._found(part), weight) for part, weight in loaded.weights.items()]
            found = [(part, weight) for part, weight in parts if part is not None]
            return LoRARequest.mix(name, next(self._count), found) if len(found) == len(parts) else None
        if loaded.folder is None or not is_adapter(loaded.folder):
            self._forget({name})
            return None
        with self._lock:
            return self._asked.setdefault(name, self.request(name, loaded))

    def _why_not(self, name: str) -> str:
        """Return the part of a message that says why the folder of this name is not an adapter."""
        reason = self._folder.why_not(name) if self._folder is not None and self.sees(name) else None
        return "" if reason is None else f": its folder is no adapter, {reason}"

    def _parts(self, weights: Mapping[str, float]) -> list[tuple[LoRARequest, float]]:
        found = {name: self._found(name) for name in sorted(weights)}
        unknown = next((name for name in weights if found[name] is None), None)
        if unknown is not None:
            raise ModelNotFoundError(
                f"no adapter {unknown[:_LONGEST]!r}{self._why_not(unknown)}{_those_there(unknown, self.names())}",
                "adapter",
            )
        return [(part, weights[name]) for name, part in found.items() if part is not None]

    def _forget(self, names: AbstractSet[str]) -> None:
        with self._lock:
            for name in names:
                if self._asked.pop(name, None) is not None:
                    self._drop(name)
            for name, loaded in self._loaded.items():
                if loaded.weights is not None and not names.isdisjoint(loaded.weights):
                    self._drop(name)
            for mix in [m for m in self._mixes.values() if any(part.name in names for part, _ in m.parts)]:
                self._forget_mix(mix.name)

    def _mixed(self, parts: Sequence[tuple[LoRARequest, float]]) -> LoRARequest:
        weights = {part.name: weight for part, weight in parts}
        name = f"{MIX}{json.dumps(weights, ensure_ascii=False)}"
        mix = LoRARequest.mix(name, next(self._count), parts)
        self._mixes.pop(name, None)
        self._mixes[name] = mix
        if len(self._mixes) > _MIXES:
            self._forget_mix(next(iter(self._mixes)))
        return mix

    def _forget_mix(self, name: str) -> None:
        del self._mixes[name]
        self._drop(name)

    def _drop(self, name: str) -> None:
        """Make the engine forget a name, also for requests that have not reached it yet."""
        self._engine.forget(name, next(self._count))


def _those_there(name: str, names: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the first known names, and the nearest one.

    The nearest name is left out if there are too many names to compare, or if none is near.
    """
    close = nearest(name[:_LONGEST], names, n=1) if len(names) <= _COMPARED else []
    there = f"Did you mean {close[0]!r}? Known:" if close else "Known:"
    more = f" and {len(names) - _TOLD:,} more, see /v1/models" if len(names) > _TOLD else ""
    return f". {there} {', '.join(names[:_TOLD]) or 'none'}{more}"
