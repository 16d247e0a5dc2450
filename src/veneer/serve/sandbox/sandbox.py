"""Separate processes for untrusted programs, that is, chat templates and grammars. They have limits and can be ended.

A call of C cannot be stopped in a thread; it may block all others, take all memory, or end the process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any, Literal

from veneer.errors import ConfigError, QueueFullError
from veneer.plain.lru import LruCache

Kind = Literal["templates", "grammars"]
_SIZE = 8  # bytes of the length in front of a message
_PROCESSES = 2
_KNOWN_SLOW = 256  # programs
_WAIT_SECONDS = 10.0  # for a process to be free
_THREAD_STACK = 1 << 21  # of a thread where the stack of a process has no limit
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from veneer.serve.sandbox.sandboxed import main; main()"
)
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")  # no keys, no tokens


class SandboxError(ConfigError):
    """Error for a program that took too much time or memory, or ended its process."""


class Sandbox:
    """Up to two processes that run programs of one kind.

    Each answer takes at most ``seconds`` of CPU time, four times as long by the clock, and ``most_bytes``. Processes
    start when they are needed, or by `warm`. A program that exceeded a limit before runs only while no other such
    program does, until it has answered once. Any thread may ask.
    """

    def __init__(self, kind: Kind, seconds: float = 5.0, most_bytes: int = 1 << 29) -> None:
        self._kind, self.seconds, self.most_bytes = kind, seconds, most_bytes
        self._places = threading.BoundedSemaphore(_PROCESSES)
        self._free: list[_Process] = []
        self._lock, self._slow_lock = threading.Lock(), threading.Lock()
        self._slow: LruCache[str, bool] = LruCache(_KNOWN_SLOW)
        self._is_closed = False

    def ask(self, program: str, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of a process to a program and its input ``about``. Both are dicts of JSON values.

        Raises SandboxError if the program exceeds a limit, and QueueFullError if no process is free in time.
        """
        if not self._slow.get(program):
            return self._asked(program, about)
        if not self._slow_lock.acquire(blocking=False):
            raise self._full("a program that is as slow as this one is")
        try:
            answer = self._asked(program, about)
            self._slow.put(program, False)  # it was slow about something else
            return answer
        finally:
            self._slow_lock.release()

    def warm(self) -> None:
        """Start one process now, which takes a second or two in the background."""
        with self._lock:
            if not self._free:
                self._free.append(_Process(self._kind, self.seconds, self.most_bytes))

    def close(self) -> None:
        """End all processes that are free; the others end after their answers."""
        with self._lock:
            self._is_closed, ended = True, self._free
            self._free = []
        for process in ended:
            process.end()

    def _asked(self, program: str, about: Mapping[str, Any]) -> dict[str, Any]:
        if not self._places.acquire(timeout=_WAIT_SECONDS):
            raise self._full("all processes are")
        try:
            answer = self._answer({"program": program, **about})
        finally:
            self._places.release()
        if answer is None:
            self._slow.put(program, True)
            if not self._is_closed:
                self.warm()  # for whoever comes next
            raise SandboxError(
                f"it takes more than {self.seconds:g} s or {self.most_bytes >> 20} MiB, or cannot be read, and so it "
                "is stopped"
            )
        return answer

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        process, answer = self._taken(), None
        try:
            answer = process.ask(asked)
        finally:
            with self._lock:
                is_kept = answer is not None and not self._is_closed
                self._free += [process] * is_kept
            if not is_kept:
                process.end()
        return answer

    def _taken(self) -> _Process:
        """Return a free process that still runs, or start one."""
        with self._lock:
            over = [process for process in self._free if process.is_over]
            self._free = [process for process in self._free if process not in over]
            found = self._free.pop() if self._free else None
        for process in over:
            process.end()
        return found or _Process(self._kind, self.seconds, self.most_bytes)

    def _full(self, busy: str) -> QueueFullError:
        return QueueFullError(f"{busy} running, and no process is free for {self._kind}: ask again", self.seconds)


class _Process:
    """A process that answers one request after another."""

    def __init__(self, kind: Kind, seconds: float, most_bytes: int) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), kind, str(seconds), str(most_bytes), str(_stack())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # a Ctrl-C is the server's
        )  # fmt: skip

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer; None if the process has ended."""
        sent, answers = self._process.stdin, self._process.stdout
        if sent is None or answers is None:
            return None
        try:
            write(sent, asked)
            return read(answers)
        except BrokenPipeError:
            return None

    @property
    def is_over(self) -> bool:
        """Return True if the process has ended."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def read(source: IO[bytes]) -> dict[str, Any] | None:
    """Return the next message; None at the end."""
    head = source.read(_SIZE)
    n = int.from_bytes(head) if len(head) == _SIZE else 0
    body = source.read(n)
    if not n or len(body) < n:
        return None
    found: dict[str, Any] = json.loads(body)
    return found


def write(target: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message."""
    body = json.dumps(message).encode()
    target.write(len(body).to_bytes(_SIZE) + body)
    target.flush()


def _stack() -> int:
    """Return the stack size in bytes for sandboxed processes.

    It is half of what this process's threads have, so that a deep recursion overflows in the sandbox first.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (_THREAD_STACK if soft == resource.RLIM_INFINITY else soft) // 2
