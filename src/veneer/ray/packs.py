"""Workers of a sweep on Ray: each pack, a group of runs that train together, is a task that takes one device."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import datasets
import ray
from ray.exceptions import RayError, RayTaskError

from veneer.ray.cluster import Devices, connected, devices, n_workers
from veneer.ray.place import RayCluster
from veneer.ray.room import n_places
from veneer.store.bars import without_bars
from veneer.train.interrupt import Stop, listening
from veneer.train.run import Tell
from veneer.train.sweep.recipe import Member, Sweep
from veneer.train.sweep.sweep import Workers
from veneer.train.sweep.together import Job, JobEnd, train_together

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0  # for packs to end their steps and write checkpoints after a signal


def on_ray(place: RayCluster) -> Callable[[Sweep, Tell, Stop], AbstractContextManager[Workers]]:
    """Return the function that gives `run_sweep` its workers, here those of a Ray cluster.

    The function raises ConfigError if the cluster has fewer devices than ``place`` takes.
    """

    @contextmanager
    def engine(sweep: Sweep, tell: Tell, stop: Stop) -> Iterator[Workers]:
        with connected(place):
            found = devices(bool(sweep.members[0].recipe.training_config().use_cpu))
            n = n_workers(place, found)
            tell(f"{n} workers on Ray, a {found.kind} each")
            places = 1
            if len(sweep.members) > n:
                places, told = _answer(_on_device(found, _room), sweep.members, n, os.getcwd())
                tell(told)
            workers = _RayWorkers(n, places, found, tell, stop)
            try:
                yield workers
            finally:
                workers.close()

    return engine


class _RayWorkers:
    """Packs (groups of runs) that train on Ray. ``_under_way`` holds the runs of each pack, keyed by Ray's reference to
    the pack's result.
    """

    def __init__(self, n: int, places: int, found: Devices, tell: Tell, stop: Stop) -> None:
        self.n_workers, self.n_places, self._tell, self._stop = n, places, tell, stop
        self._pack = _on_device(found, _train_pack)
        self._under_way: dict[Any, Sequence[Job]] = {}

    def begin(self, jobs: Sequence[Job]) -> None:
        self._tell(f"{', '.join(job.member.name for job in jobs)}: to a worker")
        self._under_way[self._pack.remote(jobs, os.getcwd())] = jobs

    def wait(self) -> tuple[Sequence[Job], Sequence[JobEnd] | str]:
        with self._stop.deferred():
            ready: list[Any] = []
            while not ready and self._stop.signal is None:
                ready, _ = ray.wait(list(self._under_way), timeout=_POLL_SECONDS)
        self._stop.check()  # `close` ends the packs
        jobs = self._under_way.pop(ready[0])
        try:
            return jobs, ray.get(ready[0])
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:  # its worker, or its node, is gone
            return jobs, (str(error).strip() or type(error).__name__).partition("\n")[0]

    def close(self) -> None:
        """Cancel the packs, which are groups of runs, that still train on workers.

        Each ends its current step and writes checkpoints. Wait for them, at most a minute.
        """
        left = list(self._under_way)
        for pack in left:
            ray.cancel(pack)
        if left:
            with self._stop.deferred():
                ray.wait(left, num_returns=len(left), timeout=_GRACE_SECONDS)


def _on_device(found: Devices, function: Callable[..., Any]) -> Any:
    return ray.remote(function).options(**found.of_task, max_retries=0)


def _answer(task: Any, *arguments: Any) -> Any:
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        raise error.cause from error


def _room(members: Sequence[Member], n: int, folder: str) -> tuple[int, str]:
    os.chdir(folder)
    return n_places(members, min(n, os.cpu_count() or 1))


def _train_pack(jobs: Sequence[Job], folder: str) -> list[JobEnd]:
    """Train a group of runs in a worker. If a signal ends the worker, checkpoints are written first."""
    os.chdir(folder)
    datasets.disable_progress_bars()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by which Ray cancels; ignored if the driver ignores it
    train = train_together
    if jobs[0].member.recipe.task != "sft":
        from veneer.learn.together import draw_together  # with a serving engine, which other packs need not wait for

        train = draw_together
    with without_bars(), listening() as stop:
        return train(jobs, _print, stop)


def _print(line: str) -> None:
    print(line, flush=True)
