"""Callback that lets methods act after each optimizer step in any Trainer, such as AdaLoRA's allocation of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.adapters import schedules
from veneer.adapters.peft_model import PeftModel
from veneer.disk.atomic import write_atomically
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import TrainingError
from veneer.train.checkpoint import checkpoint_folder

SCHEDULE_FILE = "schedule.safetensors"


class AdapterSchedule(TrainerCallback):  # type: ignore[misc]
    """Callback that lets adapters with a schedule act after each step. `SFTTrainer` installs it; any other Trainer can
    have it in ``callbacks``.

    ``source``: the checkpoint from which the run resumes, if it is not in the run's own folder.
    """

    def __init__(self, source: Path | None = None) -> None:
        self.source = source

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Create the schedules for a run of this length, or restore those of the checkpoint.

        Raises TrainingError if a resumed run's checkpoint has no scores of the schedule.
        """
        model: nn.Module = context["model"]
        if isinstance(model, PeftModel):
            model.adapter_state.schedules.clear()
            schedules.begin(model, model.adapter_state, state.max_steps)
            file = (self.source or _checkpoint(args, state)) / SCHEDULE_FILE
            if file.is_file() and (self.source is not None or state.global_step):
                schedules.restore(model.adapter_state, load_file(file))
            elif state.global_step and model.adapter_state.schedules:
                raise TrainingError(
                    f"the run goes on from step {state.global_step}, and {file}, with the scores that its adapter's "
                    "schedule needs, is not there: train with AdapterSchedule from the start, and resume in the same "
                    "output_dir or give AdapterSchedule the checkpoint"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Write the state of the schedules into the checkpoint, unless the trainer has written it already."""
        model, folder = context["model"], _checkpoint(args, state)
        if isinstance(model, PeftModel) and folder.is_dir() and not (folder / SCHEDULE_FILE).is_file():
            save_schedules(model, folder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Advance the schedules, after the step and before its gradients are cleared."""
        model: nn.Module = context["model"]
        if isinstance(model, PeftModel):
            schedules.advance(model.adapter_state, state.global_step + 1)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return checkpoint_folder(Path(args.output_dir), state.global_step)


def save_schedules(model: PeftModel, folder: Path) -> None:
    """Write the state of the schedules, if there are any."""
    found = schedules.tensors(model.adapter_state)
    if found:
        write_atomically(folder / SCHEDULE_FILE, tensors_to_bytes(found))
