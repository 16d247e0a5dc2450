"""Record of a run, ``run.json``, and the run's state as derived from it, during and after training.

Torch is not imported here: `veneer info` reads records, and a run can be refused by them before that import.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from veneer.errors import ConfigError, DivergedError, FormatError, Interrupted, Paused, VeneerError
from veneer.recipe.values import read_values

RUN_FILE = "run.json"
_CLOCK_SECONDS = 2.0  # how far two readings of one start time may lie apart
Life = Literal["over", "runs", "gone", "elsewhere"]


def record_of(output: Path) -> dict[str, Any] | None:
    """Return the record of the run in an output folder, or None if there is none.

    Raises FormatError for a file that is not a record.
    """
    path = output / RUN_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}): restore it, or move it away") from error
    if not isinstance(record, dict) or not {"status", "recipe"} <= record.keys():
        raise FormatError(f"{path} is not the record of a run: it holds no status and recipe. Move it away.")
    return record


def require_recipe(path: Path) -> None:
    """Raise ConfigError if a path is neither a recipe's readable file nor a folder with the record of a run."""
    if not path.is_dir():
        read_values(path)
    elif record_of(path) is None:
        raise ConfigError(f"{path} is no run: it holds no {RUN_FILE}. Give the output of a run, or a recipe's file.")


def this_process() -> dict[str, Any]:
    """Return the host name, process id and start time of this process, which together identify it."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def life_of(record: Mapping[str, Any]) -> Life:
    """Return whether a run is over, still running, or gone without a final status (killed, or the machine went down).

    ``elsewhere``: its status is running, but its process is on another machine or not named, so it cannot be checked.
    """
    if record["status"] != "running":
        return "over"
    process = record.get("process")
    if process is None or process["host"] != socket.gethostname():
        return "elsewhere"
    if process["pid"] == os.getpid():
        return "gone"  # an earlier process with the number of this one
    try:
        started = psutil.Process(process["pid"]).create_time()
    except psutil.Error:
        return "gone"
    return "runs" if abs(started - process["started"]) <= _CLOCK_SECONDS else "gone"


def require_over(record: Mapping[str, Any], output: Path) -> None:
    """Raise ConfigError if a process is training in this output right now."""
    if life_of(record) == "runs":
        raise ConfigError(
            f"process {record['process']['pid']} is training in {output} right now: wait for it, end it "
            f"(kill {record['process']['pid']} lets it write a checkpoint), or choose another output (--set output=…)"
        )


def told_life(record: Mapping[str, Any]) -> str:
    """Return the state of a run in a few words: its status and, if that is ``running``, whether the process still
    exists.
    """
    process = record.get("process") or {}
    where = f"process {process.get('pid')} on {process.get('host')}" if process else "a process that it does not name"
    return {
        "over": str(record["status"]),
        "runs": f"running ({where})",
        "gone": f"ended unexpectedly: its record says running, but {where} is gone",
        "elsewhere": f"running in {where}, by its record; that cannot be checked from this machine",
    }[life_of(record)]


def ending_of(error: BaseException) -> str:
    """Return the status for a run that ended with an error: diverged, failed or interrupted."""
    if isinstance(error, DivergedError):
        return "diverged"
    return "failed" if isinstance(error, Exception) else "interrupted"


def reason_of(error: BaseException) -> str:
    """Return the reason why a run ended early: a signal's name, or the error's message."""
    if isinstance(error, Interrupted):
        return signal.Signals(error.number).name
    if isinstance(error, VeneerError | Paused):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))
