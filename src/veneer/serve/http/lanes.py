"""Lanes: threads on which bodies are read, templates rendered and grammars compiled, with a time limit for each."""

from __future__ import annotations

import asyncio
import contextvars
import math
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer.serve.http.errors import BusyError, RefusedError
from veneer.serve.schedule.return_places import ReturnPlaces

Result = TypeVar("Result")
_SECONDS = 60.0
_THREADS = {"bodies": 2, "prompts": 6, "forms": 4}
_FORMS = ("structured_outputs", "response_format", "output_config", "text", "tools")  # fields that make grammars


class Lane:
    """Threads for one kind of work.

    A caller waits at most ``seconds``. A thread whose work takes longer counts as stuck until the work ends.
    """

    def __init__(self, name: str, n_threads: int, seconds: float = _SECONDS) -> None:
        self.name, self.n_threads, self._seconds = name, n_threads, seconds
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stuck: set[Future[object]] = set()
        self._threads: list[threading.Thread] = []
        self._places = ReturnPlaces()

    @property
    def n_stuck(self) -> int:
        """Number of threads whose work has exceeded the time limit."""
        return len(self._stuck)

    @property
    def is_blocked(self) -> bool:
        """Return True if all threads are stuck."""
        return self.n_stuck >= self.n_threads

    async def run(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on a thread of the lane, in the caller's context, and return its result.

        Raises the error of the work, RefusedError if it takes too long, and BusyError if it cannot begin in time.
        """
        if self.is_blocked:
            raise self._busy()
        future: Future[Result] = Future()
        self._give(future, contextvars.copy_context(), work)
        coming = asyncio.wrap_future(future)
        await asyncio.wait([coming], timeout=self._seconds)
        if coming.done():
            return coming.result()
        if future.cancel():
            raise self._busy()
        self._note_stuck(future, coming)
        raise RefusedError(
            f"the prompt, its template or its grammar takes longer than {self._seconds:g} s to read: send less, or a "
            "simpler grammar"
        )

    def _give(self, future: Future[Result], context: contextvars.Context, work: Callable[[], Result]) -> None:
        def act() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(context.run(work))
                except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                    future.set_exception(error)

        self._queue.put(act)
        if len(self._threads) < self.n_threads:
            name = f"veneer {self.name} {len(self._threads)}"
            self._threads.append(threading.Thread(target=self._acts, name=name, daemon=True))
            self._threads[-1].start()

    def _acts(self) -> None:
        while True:
            self._queue.get()()

    def _note_stuck(self, future: Future[Result], coming: asyncio.Future[Result]) -> None:
        stuck: Future[object] = future  # type: ignore[assignment]
        self._stuck.add(stuck)
        stuck.add_done_callback(self._stuck.discard)
        coming.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())

    def _busy(self) -> BusyError:
        n, longest = self.n_threads, self._seconds
        seconds = self._places.seconds(1, n, lambda ahead: longest + longest * ahead / max(n, 1))
        return BusyError(
            f"all {n} threads that read {self.name} are busy, {self.n_stuck} of them for longer than "
            f"{longest:g} s: ask again in {math.ceil(seconds)} s",
            retry_seconds=seconds,
        )


class Lanes:
    """Lanes (groups of threads) of a server: for JSON of large bodies, for prompts, and for prompts with a grammar,
    which are slowest.

    Work of one lane never waits for another lane.
    """

    def __init__(self) -> None:
        self.all = tuple(Lane(name, n) for name, n in _THREADS.items())
        self.bodies, self.prompts, self.forms = self.all

    def of(self, body: object) -> Lane:
        """Return the lane that reads a body."""
        has_form = any(getattr(body, name, None) is not None for name in _FORMS)
        return self.forms if has_form else self.prompts

    @property
    def stuck(self) -> dict[str, int]:
        """Number of stuck threads of each lane that has any."""
        return {lane.name: lane.n_stuck for lane in self.all if lane.n_stuck}


class LaneCollector(Collector):
    """Collector of the metric ``stuck_threads``."""

    def __init__(self, lanes: Lanes, model: str, prefix: str, id: str = "0") -> None:
        self._lanes, self._name, self._labels = lanes, f"{prefix}:stuck_threads", [model, id]

    def collect(self) -> Iterable[Metric]:
        """Return the metric."""
        told = "Threads that read a prompt, a template or a form for longer than they may."
        family = GaugeMetricFamily(self._name, told, labels=["model_name", "engine", "lane"])
        for lane in self._lanes.all:
            family.add_metric([*self._labels, lane.name], lane.n_stuck)
        return [family]
