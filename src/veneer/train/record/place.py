"""Checks the output folder of a run: it must be free for a new run, or hold the run that is resumed.

Torch is not imported here, so that a run can be refused before that import.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from veneer.errors import ConfigError, DataError, DiskError, listed
from veneer.recipe.early import missing_rows
from veneer.train.checkpoint import checkpoints, holds_checkpoints
from veneer.train.record.record import record_of, require_over

ADAPTER, MODEL = "adapter", "model"  # the folders that a run saves
Resume = bool | Literal["auto"]


def continues(output: Path, resume: Resume) -> bool:
    """Return True if a run is to continue. With ``auto`` that is so if its output holds a checkpoint or
    a finished run.
    """
    if resume != "auto":
        return resume
    record = record_of(output)
    return bool(checkpoints(output)) or (record is not None and record["status"] == "finished")


def require_fresh(output: Path, resume: Resume) -> None:
    """Make the output folder, or raise if a run cannot use it.

    With ``auto``, a run that ended before its first checkpoint may begin again. Raises ConfigError if a process trains
    in the folder, or if a new run would be mixed with another or overwrite its results. Raises DiskError if the folder
    cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"the output folder {output} cannot be made ({error.strerror}): choose another") from error
    require_unused(output, resume)


def require_unused(output: Path, resume: Resume) -> None:
    """Check an output folder as `require_fresh` does, without making it. Raises the same errors."""
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise DiskError(f"the output folder {output} cannot be made ({reason}): choose another")
    record = record_of(output)
    if record is not None:
        require_over(record, output)
    if continues(output, resume) or (resume and record is not None):
        return
    saved = [name for name in (ADAPTER, MODEL) if (output / name).exists()]
    further = (
        "; to train its adapter further, name it as adapter.from in a recipe with another output"
        if saved[:1] == [ADAPTER]
        else ""
    )
    if record is not None and record["status"] == "finished" and saved:
        longer = ", or go on to more steps with --resume" if holds_checkpoints(output) else ""
        raise ConfigError(f"{output} holds a finished run: choose another output (--set output=…){longer}{further}")
    if holds_checkpoints(output):
        raise ConfigError(
            f"{output} holds the checkpoints of a run: continue it with --resume, or choose another output "
            f"(--set output=…){further}"
        )
    if saved:
        raise ConfigError(
            f"{output} holds the {saved[0]} that a run saved: choose another output (--set output=…), or move it "
            f"away{further}"
        )


def refuse_place(values: Mapping[str, Any], resume: Resume) -> None:
    """Check the output folder and the data files in a recipe's ``values`` before a new run. Nothing is made.

    Raises the errors of `require_unused`, and DataError if data files do not exist.
    """
    output = Path(str(values["output"]))
    if continues(output, resume):
        return
    missing = missing_rows(values)
    try:
        require_unused(output, resume)
    except ConfigError as error:
        raise ConfigError(listed([str(error), *missing])) from error
    if missing:
        raise DataError(listed(missing))
