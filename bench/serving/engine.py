"""Processes that a benchmark asks in turns: halted while another has its turn, and ended with the benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

LEAVE = 30  # seconds that a killed process has to go
_GUARD = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


@contextmanager
def process_group(
    command: Sequence[str], stdin: int = subprocess.PIPE, stdout: int | IO[str] = subprocess.PIPE, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, with pipes for both of its streams. The group is killed behind the block.

    A guard kills it too if the benchmark itself is killed: a halted engine would keep its memory for ever. ``options``
    are those of ``subprocess.Popen``.
    """
    process = subprocess.Popen(command, stdin=stdin, stdout=stdout, text=True, start_new_session=True, **options)
    guard = subprocess.Popen([sys.executable, "-c", _GUARD, str(process.pid)], stdin=-1, start_new_session=True)
    try:
        yield process
    finally:
        guard.kill()
        guard.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers of an engine too
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE)  # a driver may hold one that was killed


def halt(process: subprocess.Popen[str]) -> None:
    """Stop a group until `go_on`: vLLM's worker spins for a second behind its answer, on one core."""
    os.killpg(process.pid, signal.SIGSTOP)


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a halted group run."""
    os.killpg(process.pid, signal.SIGCONT)
