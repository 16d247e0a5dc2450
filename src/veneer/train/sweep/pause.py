"""Pauses a member of a sweep at a rung, with a checkpoint and the loss by which members are compared."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.errors import Paused
from veneer.train.run_trainer import RunTrainer


class PauseAtRung(TrainerCallback):  # type: ignore[misc]
    """Callback that ends the training by raising `Paused`, after 1/``divisor`` of the run's steps, rounded up.

    A run that ends at that step is not paused.
    """

    def __init__(self, trainer: RunTrainer, divisor: int) -> None:
        self._trainer, self._divisor = trainer, divisor

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Pause a run that was resumed from this rung's checkpoint, before it takes another step."""
        self._pause_if_due(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask Trainer for a checkpoint if this step is the rung's."""
        control.should_save = control.should_save or self._is_due(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Pause if the checkpoint just written is the rung's."""
        self._pause_if_due(state)

    def _is_due(self, state: TrainerState) -> bool:
        rung: int = -(-state.max_steps // self._divisor)
        return bool(rung <= state.global_step < state.max_steps)

    def _pause_if_due(self, state: TrainerState) -> None:
        if self._is_due(state):
            raise Paused(state.global_step, loss_now(self._trainer))


def loss_now(trainer: RunTrainer) -> float:
    """Return the loss by which a run is compared: that on the held-out rows, or the mean training loss if there are
    none.
    """
    step = trainer.state.global_step
    if trainer.eval_dataset is None:
        return float(trainer.progress.loss / step)
    for line in trainer.state.log_history:
        if line["step"] == step and "eval_loss" in line:
            return float(line["eval_loss"])
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), description="rung", prediction_loss_only=True)
    return float(output.metrics["eval_loss"])
