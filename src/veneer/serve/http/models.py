"""The models that are served: the base, and each folder of the adapters' folder, as it is now."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.core.nearest import nearest
from veneer.serve.engine import Engine
from veneer.serve.http.errors import ModelNotFoundError
from veneer.serve.lora_request import LoRARequest

_MIXES = 64  # clients may think of any number of weights
_COMPARED, _TOLD = 1000, 10  # names, for the nearest of them, and in a message; /v1/models lists them all


class Catalogue:
    """The base under ``names``, and the adapters in a folder, by the names of their folders.

    The folder is looked at with every request: what is put there is served, what is taken away is no longer. Any thread
    may ask. A mix of them has no folder: the last 64 are known by name, so that they may stay loaded.
    """

    def __init__(self, engine: Engine, names: Sequence[str], root: str, adapters: Path | None) -> None:
        self._engine, self._names, self._root, self._folder = engine, tuple(names), root, adapters
        self._numbers: dict[str, int] = {}
        self._mixes: dict[str, LoRARequest] = {}  # the one that was asked for last at the end
        self._lock = threading.Lock()
        self._created = int(time.time())

    def adapters(self) -> dict[str, LoRARequest]:
        """The adapters that are there now; those that are gone are forgotten."""
        with self._lock:
            return self._looked_at()

    def find(self, name: str | None) -> LoRARequest | None:
        """The adapter of a name; None for the base. Raises ModelNotFoundError."""
        if name is None or name in self._names:
            return None
        adapters = self.adapters()
        if name not in adapters:
            raise ModelNotFoundError(f"no model {name!r}{_those_there(name, [*self._names, *adapters])}")
        return adapters[name]

    def mix(self, weights: Mapping[str, float]) -> LoRARequest:
        """The weighted sum of adapters by name. Raises ModelNotFoundError, and ConfigError as `LoRARequest.mix`."""
        with self._lock:
            adapters = self._looked_at()
            unknown = next((name for name in weights if name not in adapters), None)
            if unknown is None:
                return self._mixed(weights, adapters)
        raise ModelNotFoundError(f"no adapter {unknown!r}{_those_there(unknown, list(adapters))}", "adapter")

    @property
    def base(self) -> str:
        """The base's first name."""
        return self._names[0]

    def cards(self) -> dict[str, Any]:
        """The answer of ``/v1/models``."""
        cards = [self._card(name, self._root, None) for name in self._names]
        cards += [self._card(r.name, r.path, self.base) for r in self.adapters().values()]
        return {"object": "list", "data": cards}

    def _card(self, id: str, root: str, parent: str | None) -> dict[str, Any]:
        longest = self._engine.scheduler.limits.max_model_len
        card = {"id": id, "object": "model", "created": self._created, "owned_by": "veneer"}
        return card | {"root": root, "parent": parent, "max_model_len": longest, "permission": []}

    def _looked_at(self) -> dict[str, LoRARequest]:
        found = sorted(self._folder.iterdir()) if self._folder is not None and self._folder.is_dir() else []
        whole = [path for path in found if all((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))]
        there = {path.name: path for path in whole if path.name not in self._names}
        for name in self._numbers.keys() - there.keys():
            self._engine.forget(name)
            del self._numbers[name]
            for mix in [m for m in self._mixes.values() if any(part.name == name for part, _ in m.parts)]:
                self._forget_mix(mix.name)
        for name in there:
            self._numbers.setdefault(name, max(self._numbers.values(), default=0) + 1)
        return {name: LoRARequest(name, self._numbers[name], str(path)) for name, path in there.items()}

    def _mixed(self, weights: Mapping[str, float], adapters: Mapping[str, LoRARequest]) -> LoRARequest:
        name = f"mix/{json.dumps(dict(sorted(weights.items())), ensure_ascii=False)}"  # no folder has a / in it
        mix = LoRARequest.mix(name, len(self._mixes) + 1, [(adapters[n], w) for n, w in sorted(weights.items())])
        self._mixes.pop(name, None)
        self._mixes[name] = mix
        if len(self._mixes) > _MIXES:
            self._forget_mix(next(iter(self._mixes)))
        return mix

    def _forget_mix(self, name: str) -> None:
        del self._mixes[name]
        self._engine.forget(name)


def _those_there(name: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest where that is soon found, and the first of all."""
    close = nearest(name, names, n=1) if len(names) <= _COMPARED else []
    there = f"did you mean {close[0]!r}? Known:" if close else "known:"
    more = f" and {len(names) - _TOLD:,} more, see /v1/models" if len(names) > _TOLD else ""
    return f"; {there} {', '.join(names[:_TOLD]) or 'none'}{more}"
