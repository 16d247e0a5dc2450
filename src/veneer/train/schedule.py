"""The callback that lets methods act after each optimizer step: AdaLoRA's budget in any Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.adapters import schedules
from veneer.adapters.peft_model import PeftModel
from veneer.store.adapter_files import tensors_to_bytes, write_atomically

SCHEDULE_FILE = "schedule.safetensors"


class AdapterSchedule(TrainerCallback):  # type: ignore[misc]
    """Installed by `SFTTrainer`; give it to any other Trainer in ``callbacks``. It does nothing to other methods.

    ``source``: the checkpoint that the run goes on from, if any.
    """

    def __init__(self, source: Path | None = None) -> None:
        self.source = source

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Make the schedules for a run of this length, or those of the checkpoint."""
        model: nn.Module = context["model"]
        if isinstance(model, PeftModel):
            model.adapter_state.schedules.clear()
            schedules.begin(model, model.adapter_state, state.max_steps)
            if self.source is not None and (self.source / SCHEDULE_FILE).is_file():
                schedules.restore(model.adapter_state, load_file(self.source / SCHEDULE_FILE))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Act, after the step and before its gradients are gone."""
        model: nn.Module = context["model"]
        if isinstance(model, PeftModel):
            schedules.advance(model.adapter_state, state.global_step + 1)


def save_schedules(model: PeftModel, folder: Path) -> None:
    """Write what the next step depends on, where there are schedules."""
    found = schedules.tensors(model.adapter_state)
    if found:
        write_atomically(folder / SCHEDULE_FILE, tensors_to_bytes(found))
