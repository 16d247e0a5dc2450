"""Bytes that a process of `veneer train` holds beside its model, measured once for an installation.

Torch is not imported here, so that the measurement can begin before it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

from veneer.disk.atomic import write_atomically
from veneer.disk.cache import cache_dir
from veneer.errors import ConfigError

_COMMAND = (sys.executable, "-m", "veneer.plan.small_run")
_OF_A_GROUP = ("RANK", "LOCAL_", "GROUP_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Beginnings of names in the environment by which a process would train together with others."""


def start_bytes() -> int:
    """Bytes of a process that has planned and trained a tiny model: interpreter, libraries, what a run keeps.

    Raises ConfigError where it cannot be measured.
    """
    known = _known()
    if known is None:
        known = _measured()
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), json.dumps({"installation": _installation(), "bytes": known}).encode())
    return known


@contextmanager
def start_measured() -> Iterator[None]:
    """Measure `start_bytes`, where they are not known, beside what is done within; an error there ends it."""
    if _known() is not None:
        yield
        return
    process = _beginning()
    try:
        yield
    except BaseException:
        process.kill()
        process.communicate()
        _beginning.cache_clear()
        raise


def _known() -> int | None:
    try:
        return int(json.loads(_file().read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _file() -> Path:
    """Of this installation alone: how much of a library counts depends on how the system holds its file."""
    return cache_dir() / "plan" / f"start-{hashlib.sha256(_installation().encode()).hexdigest()[:12]}.json"


def _installation() -> str:
    return f"{sys.prefix}, torch {version('torch')}, transformers {version('transformers')}"


@cache
def _beginning() -> subprocess.Popen[str]:
    """The process that `_measured` waits for, begun once."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_GROUP)}
    return subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone)


@cache
def _measured() -> int:
    out, told = _beginning().communicate()
    try:
        return int(out.split()[-1])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"a process could not be measured: {told.strip()[-300:]}") from error
