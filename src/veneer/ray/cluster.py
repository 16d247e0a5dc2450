"""Connection to a Ray cluster, and the devices that it has."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import ray

from veneer.errors import ConfigError
from veneer.ray.place import RayCluster
from veneer.train.interrupt import SIGNALS


class Devices(NamedTuple):
    """Devices of a cluster, of which each worker takes one: its GPUs, or the cores of its CPUs."""

    kind: str
    n: int

    @property
    def of_task(self) -> dict[str, int]:
        """Resources that Ray reserves for a task."""
        return {"num_gpus": 1} if self.kind == "GPU" else {"num_cpus": 1}


@contextmanager
def connected(place: RayCluster) -> Iterator[None]:
    """Connect this process to a cluster while the context is open, unless it is already connected.

    Raises ConfigError if the cluster refuses, for example since it runs another version of Ray.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent
    try:
        with _handlers_kept():
            ray.init(place.address)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Ray cannot be used at {place.address or 'this machine'}: {last_line(error)}. Correct that, or train "
            "without --on"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore signal handlers after the context: Ray's handler of SIGTERM aborts the process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def devices(use_cpu: bool) -> Devices:
    """Return the devices of the connected cluster: its GPUs if there are any, unless ``use_cpu``."""
    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU", 0) >= 1 and not use_cpu else "CPU"
    return Devices(kind, int(found.get(kind, 0)))


def n_workers(place: RayCluster, found: Devices) -> int:
    """Return the number of workers to start. Raises ConfigError if there are not enough devices."""
    if not found.n:
        raise ConfigError(f"the Ray cluster has no device ({found.kind}) for a worker: add a node that has one")
    n = place.n_workers or found.n
    least = place.least or n
    if least > found.n:
        asked = f"{least}-{n}" if place.least else f"{n}"
        raise ConfigError(
            f"--on ray:{asked} is more than the {found.n} devices ({found.kind}) of the Ray cluster: each worker takes "
            f"one. Take at most {found.n}, or add nodes to the cluster."
        )
    return min(n, found.n)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, without Ray's traceback; the error's class if it has no text."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
