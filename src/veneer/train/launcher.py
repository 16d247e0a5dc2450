"""Processes of a run on this machine, started by torchrun's own launcher."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
from torch.distributed.elastic.multiprocessing.api import SignalException

from veneer.errors import ConfigError

GRACE_SECONDS = 30.0  # for processes to notice that another has ended, and for the first one to say why
_POLL_SECONDS = 0.1
_TOLD_BY_THE_FIRST = (2, 130, 143)  # exit statuses whose reason the first process prints
_SHOWN_LINES = 30


def launched(command: Sequence[str], n: int) -> int:
    """Run a command in ``n`` processes that form a group, and return the exit status of the first.

    If the first had to be ended because another failed, return the other's status. Only the first process's output is
    shown, and the end of another's stderr if that one fails. Signals are passed on to all processes, except those that
    this process ignores. If a signal comes before all have started, the started ones are ended.
    """
    environments, others = _environments(n), _children()
    with TemporaryDirectory() as logs, _handlers_kept() as before:
        try:
            context = start_processes(
                name="veneer",
                entrypoint=command[0],
                args={rank: tuple(command[1:]) for rank in range(n)},
                envs=environments,
                logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, n), Std.ALL)),
            )
            _ignore_again(before)
            try:
                codes = _codes(context)
            finally:
                context.close()  # ends those that are left
        except SignalException as error:  # outside of the wait; torch has no list of those that it was starting
            for process in _children() - others:
                process.kill()
            return 128 + int(error.sigval)
        broken = [rank for rank, code in sorted(codes.items()) if rank and code and code not in _TOLD_BY_THE_FIRST]
        for rank in broken[:1]:
            _show(rank, codes[rank], Path(context.stderrs[rank]))
    return next((code for _, code in sorted(codes.items()) if code), 0)


def require_devices(n: int) -> None:
    """Raise ConfigError if each of ``n`` processes needs a GPU, and this machine has fewer."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else n
    if n > found:
        raise ConfigError(
            f"--processes {n} is more than the {found} devices of this machine: each process takes one. Start at most "
            f"{found}, or train on the CPU (--set training.use_cpu=true)."
        )


def _environments(n: int) -> dict[int, dict[str, str]]:
    """Return torchrun's environment variables for each rank. Unless OMP_NUM_THREADS is set, it is the number of cores
    divided by ``n``, at least 1.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _n_cores() // n))),
    }
    return {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)}


def _n_cores() -> int:
    """Return the number of cores that this process may use. Under Slurm or taskset these are fewer than
    the machine's.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _codes(context: Any) -> dict[int, int]:
    """Wait until all processes end, or one has failed and a short grace period is over. Return the exit statuses by
    rank.
    """
    running = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    codes: dict[int, int] = {}
    failed_at, heard = None, False
    while running:
        try:
            time.sleep(_POLL_SECONDS)
            ended = {rank: process.returncode for rank, process in running.items() if process.poll() is not None}
            codes |= {rank: code if code >= 0 else 128 - code for rank, code in ended.items()}
            running = {rank: process for rank, process in running.items() if rank not in ended}
            if failed_at is None and any(codes.values()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
                break
        except SignalException as error:
            for process in running.values():
                process.send_signal(signal.SIGKILL if heard else error.sigval)
            heard = True
    return codes


def _show(rank: int, code: int, errors: Path) -> None:
    lines = errors.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    print("\n".join([f"process {rank} has ended with the status {code}", *lines]), file=sys.stderr)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def _ignore_again(before: Mapping[signal.Signals, Any]) -> None:
    """Ignore the signals again that were ignored before, as under nohup, because torchrun's launcher handles all of
    them.
    """
    for number in (each for each, handler in before.items() if handler is signal.SIG_IGN):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handlers_kept() -> Iterator[Mapping[signal.Signals, Any]]:
    """Yield the handlers of the signals that torchrun's launcher replaces, and restore them at the end."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
