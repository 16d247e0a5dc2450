"""Checkpoints of a training run: written whole or not at all, small, and strict when read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.disk.atomic import write_atomically
from veneer.disk.folder import drop_folder, drop_leftovers
from veneer.errors import TrainingError

TRAINED_FILE = "trained.safetensors"
STATE_FILE = "trainer_state.json"
PROGRESS_FILE = "veneer_progress.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ANY = "checkpoint-*"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step, under Trainer's name for it."""
    return run / f"checkpoint-{step}"


def holds_checkpoints(run: Path) -> bool:
    """Return True if there are any checkpoints, complete or not."""
    return any(run.glob(_ANY))


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest step first. One that was being written when a run died is not
    among them: it has another name until all of it is on disk.
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


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write every trainable parameter by its path, bit for bit."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / TRAINED_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Load the parameters that `save_trained` wrote.

    Raises TrainingError, with all differences, if the trainable parameters are not exactly those that were saved.
    """
    try:
        saved = load_file(folder / TRAINED_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{folder} cannot be resumed from: {TRAINED_FILE} is missing or damaged ({error}). Move it away to go on "
            "from the one before it"
        ) from error
    present = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{name} is trained but not in the checkpoint" for name in present.keys() - saved.keys()]
    problems += [f"{name} is in the checkpoint but not trained" for name in saved.keys() - present.keys()]
    problems += [
        f"{name} has the shape {tuple(present[name].shape)}, in the checkpoint {tuple(saved[name].shape)}"
        for name in present.keys() & saved.keys()
        if present[name].shape != saved[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise TrainingError(
            f"{folder} holds another adapter than this run trains: {shown}. Give its own settings, or start a new run"
        )
    for name, parameter in present.items():
        parameter.copy_(saved[name])


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically: the old file or the new one is there, never half of it. Raises DiskError."""
    write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the counters of `veneer.SFTTrainer` in a checkpoint; empty for one that another trainer wrote."""
    path = folder / PROGRESS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
