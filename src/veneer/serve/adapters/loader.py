"""Loader that reads adapters on its own thread while decoding continues."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from veneer.errors import ServingError

Read = TypeVar("Read")
_LOG = logging.getLogger(__name__)
_MOST_LATER = 8  # works put off, each of which may hold an adapter
_NICENESS = 4  # the step goes first, and what waits for this gets a third of a core that the step takes whole


@dataclass(frozen=True, slots=True)
class Finished(Generic[Read]):
    """Result of a load: the adapter, or the error, and the seconds that it took."""

    id: str
    result: Read | BaseException
    seconds: float


class Loader(Generic[Read]):
    """Queue of loads, run one after another. ``tell`` is called with every result, on the thread that reads.

    The thread lives only while there is something to read, so that an idle engine has no such thread, and none is left
    when the engine is deleted. Loads use one thread of torch, because the engine's step uses torch's thread pool. If no
    thread can start, waiting loads end with a ServingError. `later` is for work that no load should wait for.
    """

    def __init__(self, tell: Callable[[Finished[Read]], None]) -> None:
        self._tell = tell
        self._queue: deque[tuple[str, Callable[[], Read]]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, id: str, read: Callable[[], Read]) -> None:
        """Queue a load; never blocks."""
        with self._lock:
            self._queue.append((id, read))
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name="veneer loader")
            try:
                self._thread.start()
                return
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting, nobody must wait for it
                reason = error
        self._refuse(reason)

    def later(self, work: Callable[[], None]) -> None:
        """Queue work that runs when no load waits, or earlier if too much work is queued.

        Call it from a load, on the thread that reads.
        """
        with self._lock:
            self._later.append(work)

    def stop(self) -> None:
        """Drop the loads that have not begun, without a result. Wait for the current load and for deferred work."""
        with self._lock:
            self._queue.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _refuse(self, reason: Exception) -> None:
        """End all waiting loads with a ServingError, because no thread could be started to read them."""
        with self._lock:
            refused, self._thread = [id for id, _ in self._queue], None
            self._queue.clear()
        for id in refused:
            self._tell(Finished(id, ServingError(f"no thread that reads adapters could be started: {reason}"), 0.0))

    def _work(self) -> None:
        try:
            _be_alone()
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse(error)
            return
        while (next_work := self._next()) is not None:
            next_work()
            del next_work  # it holds the model

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._queue and len(self._later) <= _MOST_LATER:
                return partial(self._load, *self._queue.popleft())
            if self._later:
                return partial(_finish, self._later.popleft())
            self._thread = None
            return None

    def _load(self, id: str, read: Callable[[], Read]) -> None:
        start = time.perf_counter()
        self._tell(Finished(id, _result(read), time.perf_counter() - start))


def _finish(work: Callable[[], None]) -> None:
    """Do deferred work. A failure is only logged, because loads wait for the thread."""
    failed = _result(work)
    if failed is not None:
        _LOG.error("a task after the load of an adapter failed", exc_info=failed)


def _result(read: Callable[[], Read]) -> Read | BaseException:
    try:
        with torch.no_grad():
            return read()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the load is waited for
        return error


def _be_alone() -> None:
    """Make torch compute on this thread only, and lower its priority.

    Each thread has its own number of threads. But a thread that has not computed yet uses the number that any thread
    set last. Another thread therefore sets the old number again.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    setter = threading.Thread(target=torch.set_num_threads, args=(n_threads,))
    setter.start()
    setter.join()
    if sys.platform == "linux":  # where a thread has a niceness of its own
        thread = threading.get_native_id()
        with suppress(OSError):  # a system may forbid it, and then this reads faster than it should
            os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
