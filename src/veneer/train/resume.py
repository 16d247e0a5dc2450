"""Writes checkpoints of a trainer, and continues from them bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, has_length

from veneer.adapters.peft_model import PeftModel
from veneer.disk.folder import new_folder
from veneer.errors import TrainingError
from veneer.train.checkpoint import (
    PROGRESS_FILE,
    STATE_FILE,
    checkpoint_folder,
    drop_old,
    drop_partial,
    latest_checkpoint,
    read_progress,
    write_json,
)
from veneer.train.first_step import changes_nothing
from veneer.train.processes import by_main, gathered
from veneer.train.progress import Progress
from veneer.train.pushing import failures_to_push_told
from veneer.train.schedule import AdapterSchedule, save_schedules
from veneer.train.trained_values import TRAINED_FILE, load_trained, save_trained


class EpochEnds(TrainerCallback):  # type: ignore[misc]
    """Callback that records an epoch as finished in the checkpoints written after its last step."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not control.should_training_stop and state.global_step < state.max_steps:
            self._trainer.epoch = (self._trainer.epoch[0] + 1, state.global_step)


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Mixin for a trainer whose checkpoints are complete or absent, and hold all state that the next step depends on.

    A checkpoint of an adapted model holds the adapter, every trained parameter in its own precision, optimizer,
    schedule, random states and counters. It holds no weight of the base.
    """

    optimizer: Any
    hub_model_id: str | None
    progress: Progress
    data_digest: str | None
    schedule: AdapterSchedule
    order: Any = None  # a sampler of the training rows with an order for each epoch
    epoch: tuple[int, int] = (0, 0)  # the one in progress, and the steps before it
    began: float = 0.0  # of this process's training, by the clock of `time.perf_counter`
    other_data: bool = False  # whether a checkpoint may have been trained on other data
    other_settings: bool = False  # whether it was trained with other settings, which count from here on
    _owes_evaluation: bool = False  # that of the beginning, put off until the first step is made

    def resolve_resume(self, resume: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, which is the latest if ``resume`` is True.

        Raises TrainingError if there is none, or if it belongs to another run.
        """
        run = Path(self.args.output_dir)
        if not resume:
            by_main(lambda: drop_partial(run))
            self.progress, self.schedule.source, self.epoch = Progress(), None, (0, 0)
            return None
        folder = by_main(lambda: latest_checkpoint(run)) if resume is True else Path(resume)
        if not (folder / STATE_FILE).is_file():
            raise TrainingError(f"{folder} is not a complete checkpoint: it holds no {STATE_FILE}. Give another folder")
        counted = read_progress(folder)
        before = counted.get("data_digest")
        if before is not None and before != self.data_digest and not self.other_data:
            raise TrainingError(
                f"{folder} was trained on other data, or with another tokenizer, max_length or packing. Give the same "
                "data, or start a new run from the adapter in that folder (adapter.from in a recipe)."
            )
        by_main(lambda: drop_partial(run))
        self.progress = Progress.from_dict(counted)
        self.epoch = (counted.get("epoch", 0), counted.get("steps_before_epoch", 0))
        self.restore_counters(counted, folder)
        return str(folder)

    def seconds_trained(self) -> float:
        """The seconds of the training so far, with those before the checkpoint from which it resumed."""
        return self.progress.seconds + time.perf_counter() - self.began

    def counters(self) -> dict[str, Any]:
        """Return the counters for a checkpoint, besides the losses of `Progress`, as JSON values."""
        return {}

    def restore_counters(self, counted: dict[str, Any], folder: Path) -> None:
        """Restore the `counters` of the checkpoint in ``folder``."""

    def _init_training_state(self, max_steps: int, *args: Any, **options: Any) -> Any:
        """Restore the checkpoint's counters, but keep this run's own intervals of logs, evaluations and saves."""
        found = super()._init_training_state(max_steps, *args, **options)
        self.state.compute_steps(self.args, max_steps)
        return found if has_length(self.train_dataset) else self._place_in_stream()

    def _place_in_stream(self) -> tuple[int, int]:
        """Return the number of finished epochs, and of the current epoch's finished micro-batches.

        Trainer derives them from the number of rows, which it takes to be infinite for a stream.
        """
        number, before = self.epoch
        within = (self.state.global_step - before) * self.args.gradient_accumulation_steps
        return number, 0 if self.args.ignore_data_skip else within

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of optimizer and scheduler, but keep this run's own settings, such as learning rates."""
        own = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        base = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.other_settings or not isinstance(self.lr_scheduler, LambdaLR):
            return
        scheduler = self.lr_scheduler
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, scheduler.lr_lambdas, strict=True)]
        scheduler.base_lrs, scheduler._last_lr = base, rates
        for group, kept, rate in zip(self.optimizer.param_groups, own, rates, strict=True):
            group.update({**kept, "lr": rate})

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate as Trainer does. In a resumed run, skip the evaluation before the first step (``skip_scheduler``).

        If a new run's first step cannot change the model, postpone that evaluation until after the step. Its values are
        the same, and training starts sooner.
        """
        begins = skip_scheduler and self.state.global_step == 0
        self._owes_evaluation = begins and changes_nothing(self.optimizer, self.model)
        if self._owes_evaluation or (skip_scheduler and not begins):
            return {}
        return cast("dict[str, float]", super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler))

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Log, save and evaluate as Trainer does. Before that, run the postponed first evaluation unless one is due now
        anyway.
        """
        if self._owes_evaluation and not self.control.should_evaluate:
            logs = self.control.should_log
            super()._evaluate(None, None, skip_scheduler=True)
            self.control.should_log = logs  # its own line is no line of the step
        self._owes_evaluation = False
        super()._maybe_log_save_evaluate(*args, **options)

    def _run_epoch(self, **options: Any) -> None:
        """Run the epoch. If the run resumes from its last step's checkpoint, run no step; Trainer would run one."""
        if self.order is not None:  # accelerate does not reach it within an epoch that several processes go on with
            self.order.set_epoch(options["epoch"])
        if options["epoch"] != self.epoch[0]:
            self.epoch = (options["epoch"], self.state.global_step)
        if self._misses_evaluation(options):
            metrics = self._evaluate(options["trial"], options["ignore_keys_for_eval"])
            self._determine_best_metric(metrics, options["trial"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def _misses_evaluation(self, options: Mapping[str, Any]) -> bool:
        """Return True if the run resumes from an epoch's last step, and the checkpoint was written before the
        evaluation that is due at the epoch's end.
        """
        step, begins = self.state.global_step, options["epoch"] == options["epochs_trained"]
        at_end = options["steps_trained_in_current_epoch"] == 0 and not self.args.ignore_data_skip
        at_end = at_end or step >= self.state.max_steps
        wanted = self.args.eval_strategy == IntervalStrategy.EPOCH and (self.args.eval_delay or 0) <= self.state.epoch
        if not (wanted and step and begins and at_end):
            return False
        lines = [line for line in self.state.log_history if line["step"] == step]
        return not any(key.startswith("eval_") and key.endswith("loss") for line in lines for key in line)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        target = checkpoint_folder(run, self.state.global_step)
        if self.state.best_global_step:
            best = checkpoint_folder(run, self.state.best_global_step)
            if best == target or by_main(best.exists):
                self.state.best_model_checkpoint = str(best)
        of_processes = [] if self.args.save_only_model else gathered(self.own_files())
        files = [file for own in of_processes for file in own]
        by_main(lambda: self._write_checkpoint(run, target, files))

    def own_files(self) -> list[tuple[str, bytes]]:
        """Return name and content of the checkpoint files that each process writes for itself."""
        return [self._random_state()]

    def _write_checkpoint(self, run: Path, target: Path, files: Sequence[tuple[str, bytes]]) -> None:
        with new_folder(target) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_trained(folder)
            self._save_state(folder)
            for name, content in files:
                (folder / name).write_bytes(content)
        if self.args.push_to_hub:
            self._tell_failed_uploads()
            with failures_to_push_told(self.hub_model_id, target):
                self._push_from_checkpoint(str(target))
        best_path = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        drop_old(run, self.args.save_total_limit, best_path)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_uploads()

    def _tell_failed_uploads(self) -> None:
        """Warn once of each failed upload of a checkpoint. Uploads run in the background."""
        current = getattr(self, "push_in_progress", None)
        if current is None or not current.is_done():
            return
        self.push_in_progress = None
        for upload in current.jobs:
            with failures_to_push_told(self.hub_model_id, Path(self.args.output_dir)):
                upload.result()

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        """Upload as Trainer does. A failed upload is reported, and the run continues."""
        with failures_to_push_told(self.hub_model_id, Path(self.args.output_dir)):
            return super().push_to_hub(*args, **options)

    def _random_state(self) -> tuple[str, bytes]:
        """Return the name and content of the checkpoint's file with this process's random state."""
        with TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def _save_trained(self, folder: Path) -> None:
        """Save the adapter's parameters and schedules that the next step needs, as far as the adapter's own files do
        not hold them.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and isinstance(model, PeftModel):
            save_trained(model, folder)
            save_schedules(model, folder)

    def _save_state(self, folder: Path) -> None:
        """Save what a resumed run needs besides weights: the optimizer and scheduler (unless ``save_only_model``),
        counters, and callbacks' states.
        """
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
        place = {"epoch": self.epoch[0], "steps_before_epoch": self.epoch[1], "data_digest": self.data_digest}
        counted = {**self.progress.as_dict(), "seconds": self.seconds_trained()}
        write_json(folder / PROGRESS_FILE, {**counted, **self.counters(), **place})
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept = self.state.stateful_callbacks.get(type(callback).__name__)
                if isinstance(kept, list):
                    kept.append(callback.state())
                else:
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / STATE_FILE))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the tokenizer and the adapter, or the model if it is trained whole. The training arguments, which
        transformers pickles, are not saved.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(str(folder), state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.schedule.source = folder
        if (folder / TRAINED_FILE).exists() or isinstance(self.model, PeftModel):
            load_trained(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            load_trained(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Enter a context after which the random states are as before, even if the block draws random numbers."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
