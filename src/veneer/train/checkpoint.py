"""Folders of a run's checkpoints, and small files in them. Each is written completely or not at all.

Torch is not imported here, so that a run can be refused before that import.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from veneer.disk.atomic import write_atomically
from veneer.disk.folder import drop_folder, drop_leftovers
from veneer.errors import TrainingError

STATE_FILE = "trainer_state.json"
PROGRESS_FILE = "veneer_progress.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ANY = "checkpoint-*"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step``, under Trainer's name for it."""
    return run / f"checkpoint-{step}"


def holds_checkpoints(run: Path) -> bool:
    """Return True if there are any checkpoints, complete or not."""
    return any(run.glob(_ANY))


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest step first.

    An unfinished one is not among them: it has another name until all of it is on disk.
    """
    found = [(int(match[1]), path) for path in run.glob(_ANY) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if _readable(path / STATE_FILE)]


def latest_checkpoint(run: Path) -> Path:
    """Return the last complete checkpoint. Raises TrainingError if there is none."""
    found = checkpoints(run)
    if not found:
        raise TrainingError(
            f"nothing to resume: {run} holds no complete checkpoint-N folder. Leave --resume out to begin anew (in "
            "Python resume_from_checkpoint)"
        )
    return found[-1]


def drop_partial(run: Path) -> None:
    """Delete the half-written checkpoints of a run that died."""
    drop_leftovers(run, _ANY)


def drop_old(run: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints until ``keep`` are left; the last and the best ones always stay."""
    found = checkpoints(run)
    old = [path for path in found[:-1] if best is None or path.name != best.name]
    surplus = 0 if keep is None else len(found) - max(keep, 1)
    for path in old[: max(surplus, 0)]:
        drop_folder(path)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically: after an error the old file is still complete. Raises DiskError if writing fails."""
    write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the counters of `veneer.SFTTrainer` in a checkpoint; empty if another trainer wrote it."""
    path = folder / PROGRESS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
