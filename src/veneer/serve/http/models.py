"""The models that are served: the base, and each folder of the adapters' folder, as it is now."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.serve.engine import Engine
from veneer.serve.http.errors import ModelNotFoundError
from veneer.serve.lora_request import LoRARequest


class Catalogue:
    """The base under ``names``, and the adapters in a folder, by the names of their folders.

    The folder is looked at with every request: what is put there is served, what is taken away is no longer. Any thread
    may ask.
    """

    def __init__(self, engine: Engine, names: Sequence[str], root: str, adapters: Path | None) -> None:
        self._engine, self._names, self._root, self._folder = engine, tuple(names), root, adapters
        self._numbers: dict[str, int] = {}
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
            raise ModelNotFoundError(f"no model {name!r}; there are {[*self._names, *adapters]}")
        return adapters[name]

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
        for name in there:
            self._numbers.setdefault(name, max(self._numbers.values(), default=0) + 1)
        return {name: LoRARequest(name, self._numbers[name], str(path)) for name, path in there.items()}
