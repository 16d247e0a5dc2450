"""Bytes of a process of `veneer train` besides its model, measured once for an installation.

Torch is not imported here, so that the measurement can begin before that import.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from veneer.disk.atomic import write_atomically
from veneer.disk.cache import cache_dir
from veneer.errors import ConfigError, DiskError
from veneer.plain.progress import waiting_for

_PROGRAM = "from veneer.plain.unused_packages import hide_unused; hide_unused()\n"  # as `veneer train` begins
_COMMAND = (sys.executable, "-P", "-c", f"{_PROGRAM}from veneer.plan.small_run import main; main()")
"""Modules in the folder that a user works in are none of the process's (-P)."""
_OF_A_GROUP = (
    "RANK", "LOCAL_", "GROUP_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_",
    "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL",
)  # fmt: skip
"""Beginnings of names in the environment by which a process would train together with others."""
LONGEST = 300.0
"""Seconds that it may take, beside much other work."""


def start_bytes() -> int:
    """Return the bytes of a process that has planned and trained a tiny model: interpreter, libraries, the run's own.

    Raises ConfigError if it cannot be measured.
    """
    known = known_start()
    if known is None:
        waiting_for("measuring what a process starts with, once")
        known = _measured()
        with suppress(DiskError):  # measured anew next time
            write_atomically(_file(), json.dumps({"installation": _installation(), "bytes": known}).encode())
    return known


@contextmanager
def start_measured() -> Iterator[None]:
    """Enter a context in which another process measures `start_bytes`, if they are unknown.

    The other process ends with the context, even if its result was never read.
    """
    if known_start() is not None:
        yield
        return
    _beginning()
    try:
        yield
    finally:
        if _beginning.cache_info().currsize:
            _beginning().end()
            _beginning.cache_clear()


def known_start() -> int | None:
    """Return `start_bytes` if they were measured before; None otherwise."""
    try:
        return int(json.loads(_file().read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _file() -> Path:
    """Return the path of the cache file for this installation. Each installation has its own, because the measured
    bytes depend on how the system maps its libraries.
    """
    return cache_dir() / "plan" / f"start-{hashlib.sha256(_installation().encode()).hexdigest()[:12]}.json"


def _installation() -> str:
    versions = [f"{name} {version(name)}" for name in ("veneer", "torch", "transformers", "trl")]
    return f"{_PROGRAM}{sys.prefix} on {platform.node()}, Python {platform.python_version()}, {', '.join(versions)}"


class _Beginning:
    """A process that trains a tiny model in a temporary folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        alone = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_GROUP)}
        self.process = subprocess.Popen(
            (*_COMMAND, self._folder.name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone
        )

    def told(self) -> tuple[str, str]:
        """Wait for the process to end, and return its stdout and stderr."""
        try:
            return self.process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return "", f"it took more than {LONGEST:.0f} seconds"
        finally:
            self.end()

    def end(self) -> None:
        """End the process and remove its folder."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self._folder.cleanup()


@cache
def _beginning() -> _Beginning:
    return _Beginning()


def _measured() -> int:
    out, told = _beginning().told()
    _beginning.cache_clear()
    try:
        return int(out.split()[-1])
    except (IndexError, ValueError) as error:
        raise ConfigError(
            f"a process could not be measured: {told.strip()[-300:]}. `veneer env` says what this installation lacks"
        ) from error
