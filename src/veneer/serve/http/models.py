"""Served models: the base, and each folder that the adapters' folder contains now."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.core.nearest import nearest
from veneer.serve.engine import Engine
from veneer.serve.http.errors import ModelNotFoundError
from veneer.serve.lora_request import LoRARequest

_SETTLED = 10**9  # nanoseconds after which a folder that changes again shows another time
_SHARE = 0.05  # of the time, at most, in which requests look through a folder so large that a look takes longer than
_CHEAP = 0.01  # seconds
_MIXES = 64  # clients may think of any number of weights
_COMPARED, _TOLD = 1000, 10  # names, for the nearest of them, and in a message; /v1/models lists them all


class Catalogue:
    """Base under ``names``, and the adapters in a folder, by the names of their folders.

    The folder is read with every request: added adapters are served, removed ones no longer. Only the files of the
    requested adapter are read, so that a request costs the same however many there are. Requests look for others that
    are gone, and list what is there, for at most a twentieth of the time if that takes long. Any thread may call it. A
    mix has no folder: the last 64 are kept by name, so that they may stay loaded.
    """

    def __init__(self, engine: Engine, names: Sequence[str], root: str, adapters: Path | None) -> None:
        self._engine, self._names, self._root, self._folder = engine, tuple(names), root, adapters
        self._asked: dict[str, LoRARequest] = {}  # adapters that a request has named
        self._mixes: dict[str, LoRARequest] = {}  # the one that was asked for last at the end
        self._count, self._changed = itertools.count(1), -1
        self._there: list[str] = []  # names, when all adapters were looked at last
        self._not_before = 0.0  # when requests may look through the folder again
        self._lock = threading.Lock()
        self._created = int(time.time())

    def adapters(self) -> dict[str, Path]:
        """Return the folders of the adapters that exist now, by name; those that are gone are forgotten."""
        with self._lock:
            return self._looked_at()

    def find(self, name: str | None) -> LoRARequest | None:
        """Return the adapter of a name; None for the base. Raises ModelNotFoundError."""
        if name is None or name in self._names:
            return None
        with self._lock:
            found = self._found(name)
            if found is not None:
                return found
            there = self._names_there()
        raise ModelNotFoundError(f"no model {name!r}{_those_there(name, [*self._names, *there])}")

    def mix(self, weights: Mapping[str, float]) -> LoRARequest:
        """Return the weighted sum of adapters by name.

        Raises ModelNotFoundError, and ConfigError as `LoRARequest.mix` does.
        """
        with self._lock:
            found = {name: self._found(name) for name in sorted(weights)}
            unknown = next((name for name in weights if found[name] is None), None)
            if unknown is None:
                return self._mixed([(part, weights[name]) for name, part in found.items() if part is not None])
            there = self._names_there()
        raise ModelNotFoundError(f"no adapter {unknown!r}{_those_there(unknown, there)}", "adapter")

    @property
    def base(self) -> str:
        """First name of the base."""
        return self._names[0]

    def cards(self) -> dict[str, Any]:
        """Return the answer of ``/v1/models``."""
        cards = [self._card(name, self._root, None) for name in self._names]
        cards += [self._card(name, str(path), self.base) for name, path in self.adapters().items()]
        return {"object": "list", "data": cards}

    def card(self, name: str) -> dict[str, Any]:
        """Return the answer of ``/v1/models/{name}``. Raises ModelNotFoundError."""
        adapter = self.find(name)
        return self._card(name, self._root, None) if adapter is None else self._card(name, adapter.path, self.base)

    def _card(self, id: str, root: str, parent: str | None) -> dict[str, Any]:
        longest = self._engine.scheduler.limits.max_model_len
        card = {"id": id, "object": "model", "created": self._created, "owned_by": "veneer"}
        return card | {"root": root, "parent": parent, "max_model_len": longest, "permission": []}

    def _looked_at(self) -> dict[str, Path]:
        """Look at all adapters."""
        there = {path.name: path for path in self._entries() if path.name not in self._names and _is_adapter(path)}
        self._forget_others_than(there)
        self._there = list(there)
        return there

    def _names_there(self) -> list[str]:
        """The names of all adapters, as they were a while ago if it takes long to look."""
        with self._seldom() as may_look:
            return list(self._looked_at()) if may_look else self._there

    @contextmanager
    def _seldom(self) -> Iterator[bool]:
        """A block that looks through the folder, if True; its time says when the next may."""
        start = monotonic()
        may_look = start >= self._not_before
        yield may_look
        if may_look:
            now = monotonic()
            took = now - start
            self._not_before = now + took / _SHARE if took > _CHEAP else now

    def _found(self, name: str) -> LoRARequest | None:
        """Look at one adapter, and at the names of the others if an entry of the folder came or went."""
        if self._folder is None or not _is_entry(name) or name in self._names:
            return None
        changed = _changed(self._folder)
        if changed != self._changed:
            with self._seldom() as may_look:
                if may_look:
                    self._changed = changed if time.time_ns() - changed > _SETTLED else -1  # its clock is coarse
                    self._forget_others_than({path.name for path in self._entries()})
        path = self._folder / name
        if not _is_adapter(path):
            self._forget(name)
            return None
        if name not in self._asked:
            self._asked[name] = LoRARequest(name, next(self._count), str(path))
        return self._asked[name]

    def _entries(self) -> Iterator[Path]:
        if self._folder is not None and self._folder.is_dir():
            yield from (self._folder / name for name in sorted(os.listdir(self._folder)))

    def _forget_others_than(self, names: Collection[str]) -> None:
        for name in [name for name in self._asked if name not in names]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        if self._asked.pop(name, None) is None:
            return
        self._engine.forget(name)
        for mix in [m for m in self._mixes.values() if any(part.name == name for part, _ in m.parts)]:
            self._forget_mix(mix.name)

    def _mixed(self, parts: Sequence[tuple[LoRARequest, float]]) -> LoRARequest:
        weights = {part.name: weight for part, weight in parts}
        name = f"mix/{json.dumps(weights, ensure_ascii=False)}"  # no folder has a / in it
        mix = LoRARequest.mix(name, len(self._mixes) + 1, parts)
        self._mixes.pop(name, None)
        self._mixes[name] = mix
        if len(self._mixes) > _MIXES:
            self._forget_mix(next(iter(self._mixes)))
        return mix

    def _forget_mix(self, name: str) -> None:
        del self._mixes[name]
        self._engine.forget(name)


def _is_entry(name: str) -> bool:
    """True for a name that an entry of a folder can have, and so leads nowhere else."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def _is_adapter(path: Path) -> bool:
    return all(os.path.isfile(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))  # False for a name that is too long


def _changed(folder: Path) -> int:
    """The time at which an entry of a folder came or went; -1 if it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _those_there(name: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest where that is soon found, and the first of all."""
    close = nearest(name, names, n=1) if len(names) <= _COMPARED else []
    there = f"did you mean {close[0]!r}? Known:" if close else "known:"
    more = f" and {len(names) - _TOLD:,} more, see /v1/models" if len(names) > _TOLD else ""
    return f"; {there} {', '.join(names[:_TOLD]) or 'none'}{more}"
