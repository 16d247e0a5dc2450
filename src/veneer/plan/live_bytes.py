"""Bytes of the tensors that are alive while a step runs, real or traced, by the marks that the step sets."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.ops.traced import SilentMode, tensors_in


class Event(NamedTuple):
    """Allocation (``n_bytes`` > 0) or release of the storage ``number``, during the part of the step named ``mark``."""

    number: int
    n_bytes: int
    mark: str


class LiveBytes(SilentMode):  # type: ignore[no-untyped-call]
    """Context that records every allocation and release of a storage, with the part of the step that `mark` named last.

    Storages that exist before are passed to `hold`, with their kind. Tensors that autograd's hooks pack into files do
    not count as alive. Scratch memory within a kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.kinds: dict[int, str] = {}
        self._mark = "load"
        self._numbers: dict[int, int] = {}

    def mark(self, name: str) -> None:
        """Begin a part of the step: later allocations and releases belong to it."""
        self._mark = name

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Record a tensor that exists before the step, with its kind. If it is recorded already, set its kind."""
        self._see(tensor)
        self.kinds.setdefault(self._numbers[_storage_of(tensor)._cdata], kind)

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Note the storages of an op's outputs."""
        for tensor in tensors_in(out):
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = _storage_of(tensor)
        key = storage._cdata
        if key in self._numbers:
            return
        number, n_bytes = len(self.events), storage.nbytes()
        self._numbers[key] = number
        self.events.append(Event(number, n_bytes, self._mark))
        weakref.finalize(storage, self._gone, key, number, n_bytes).atexit = False

    def _gone(self, key: int, number: int, n_bytes: int) -> None:
        if self._numbers.get(key) == number:
            del self._numbers[key]
        self.events.append(Event(number, -n_bytes, self._mark))


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "bare", tensor).untyped_storage()


@dataclass(frozen=True, slots=True)
class Peak:
    """Largest number of bytes alive under one mark, by kind."""

    kinds: Mapping[str, int]

    @property
    def n_bytes(self) -> int:
        """Sum over all kinds."""
        return sum(self.kinds.values())


def peaks(events: Iterable[Event], kinds: Mapping[int, str], default: Callable[[str], str]) -> dict[str, Peak]:
    """Return the peak under each mark, in the order of the marks.

    ``kinds`` gives the kind of storages by number. For any other storage, ``default`` returns the kind, given the mark
    at which it was allocated.
    """
    live: defaultdict[str, int] = defaultdict(int)
    born: dict[int, str] = {}
    found: dict[str, Peak] = {}
    most: dict[str, int] = {}
    total = 0
    for event in events:
        if event.n_bytes >= 0 and event.number not in born:
            born[event.number] = kinds.get(event.number) or default(event.mark)
        live[born[event.number]] += event.n_bytes
        total += event.n_bytes
        if total > most.get(event.mark, -1):
            most[event.mark] = total
            found[event.mark] = Peak({kind: n for kind, n in live.items() if n})
    return found
