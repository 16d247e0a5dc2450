"""Saves and loads the trained parameters of a checkpoint: they are few, and every mismatch is an error."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.errors import TrainingError

TRAINED_FILE = "trained.safetensors"


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
