"""Runs a recipe: load, read, train, evaluate, save, and record the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import Interrupted
from veneer.model.memory.available import high_water
from veneer.model.memory.default_device import told_device
from veneer.model.memory.gpu_failure import gpu_failure, unusable_gpu
from veneer.plain.group import n_on_this_machine
from veneer.plain.progress import waits_told
from veneer.recipe.adapter import FULL
from veneer.recipe.changes import places_of
from veneer.recipe.parts import DataPart
from veneer.recipe.recipe import Recipe
from veneer.store.hub import require_hub
from veneer.train.callbacks import BeginReport, LastEvaluation, ShortRunLog, StepClock
from veneer.train.checkpoint import checkpoint_folder, checkpoints, latest_checkpoint
from veneer.train.interrupt import Stop, StopAfterStep, listening
from veneer.train.output import (
    other_files,
    require_free,
    save_trained,
    taken_back,
    usable,
)
from veneer.train.processes import by_main, is_main, n_processes, require_alike, together
from veneer.train.recipe_trainer import make_trainer
from veneer.train.record.going_on import PROCESSES, GoingOn, changes_since, files_of, is_complete, parent_of, with_data
from veneer.train.record.place import ADAPTER, MODEL, Resume, continues
from veneer.train.record.record import ending_of, life_of, reason_of, record_of, this_process, told_life
from veneer.train.record.written import WrittenRecord
from veneer.train.run_trainer import RunTrainer
from veneer.train.show.report import draw_loss, environment

Tell = Callable[[str], None]


def run_recipe(
    recipe: Recipe,
    *,
    resume: Resume = False,
    allow_changes: bool = False,
    planned: Mapping[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run a recipe and return the content of ``run.json``, with the ``planned`` and the measured memory.

    Writes into the recipe's output: ``adapter/`` (``model/`` for a model trained whole), ``run.json``, ``loss.png``,
    checkpoints and TensorBoard's files. After SIGTERM or SIGINT, the current step ends, a checkpoint is written, and
    Interrupted is raised.

    ``resume="auto"`` begins the run if its output holds no checkpoint, and otherwise continues it; the main process
    decides. A refused resume leaves the run as it was. A resume of a finished run changes nothing. ``allow_changes``
    accepts other settings or data than the run began with, and records the changes with their steps.

    Raises the errors of its parts. Raises ConfigError also if the output holds a run and ``resume`` is false, or if a
    process trains in it. Raises it as well if a resumed run has other settings or data, unless ``allow_changes``.
    Raises DiskError if the output cannot be made.
    """
    output = Path(recipe.output)
    args = recipe.training_config()
    if args.push_to_hub:
        require_hub()
    _ = args.device  # several processes meet here
    recipe.distributed.require_layout(n_processes(), n_on_this_machine())
    with listening() as stop, together():
        found = by_main(lambda: _found_in(output, recipe.data, resume))
        found.tell_of(output, tell)
        before = found.record if found.goes_on else None
        changes = [] if before is None else changes_since(before, recipe, allow_changes)
        if before is not None and is_complete(before, recipe):
            tell(f"{output} holds this run, already finished: nothing is changed")
            return before
        if before is not None and life_of(before) != "over":
            tell(f"{output}: {told_life(before)}; going on from its last checkpoint")
        with taken_back(output, found.is_new):
            if found.goes_on:
                by_main(lambda: latest_checkpoint(output))  # told before a model is loaded
            recipe.distributed.copy_size(n_processes(), n_on_this_machine())  # as is auto without a plan
            trainer = make_trainer(recipe)
        going_on = GoingOn(before, changes, allow_changes) if found.goes_on else None
        return carry_out(recipe, trainer, going_on=going_on, stop=stop, planned=planned, tell=tell)


class _FoundOutput(NamedTuple):
    """Output folder of a run before it begins. ``goes_on``: the run in it continues. ``record``: that run's record, if
    any. ``others``: a note on files that do not belong to a run.
    """

    is_new: bool
    goes_on: bool
    record: dict[str, Any] | None
    others: str | None

    def tell_of(self, output: Path, tell: Tell) -> None:
        if self.record is not None and not self.goes_on:
            tell(f"{output}: {told_life(self.record)}; it wrote no checkpoint, so the run begins again")
        if self.others is not None:
            tell(self.others)


def _found_in(output: Path, data: DataPart, resume: Resume) -> _FoundOutput:
    """Make the output folder if it is missing, and return what it holds. Raises the errors of `require_free`."""
    is_new = not output.exists()
    require_free(output, data, resume)
    goes_on = continues(output, resume)
    record = record_of(output) if resume else None
    return _FoundOutput(is_new, goes_on, record, None if goes_on or is_new else other_files(output))


def carry_out(
    recipe: Recipe,
    trainer: RunTrainer,
    *,
    going_on: GoingOn | None = None,
    stop: Stop | None = None,
    planned: Mapping[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run a recipe as `run_recipe` does, with a given trainer.

    If the run ends early, ``run.json`` has its status, its step, the ``reason`` and its log. If the run is refused
    before it trains, that file stays unchanged.
    """
    if (reason := unusable_gpu()) or trainer.args.device.type != "cpu":
        tell(f"device: {told_device(trainer.args.device)}" + (f", not the GPU: {reason}" if reason else ""))
    tell(trainer.describe())
    record = describe_run(recipe, trainer) | ({} if planned is None else {"plan": dict(planned)})
    require_alike({key: record[key] for key in ("recipe", "data", "parent", "n_trained")})
    if going_on is not None:
        going_on = with_data(going_on, record)
        trainer.other_data = going_on.allow_changes
        trainer.other_settings = any(each.key != PROCESSES for each in going_on.changes)
    written = WrittenRecord(Path(recipe.output), record, None if going_on is None else going_on.recorded)
    if going_on is None:
        written.begin(0)
    else:
        trainer.add_callback(BeginReport(written.begin))
    saved = Path(recipe.output) / (MODEL if recipe.method == FULL else ADAPTER)
    try:
        with together():
            results = _trained(trainer, saved, recipe.adapter, going_on is not None, stop or Stop())
    except BaseException as broken:
        error = _explained(broken, recipe, trainer.state.global_step)
        written.end(
            {
                "status": ending_of(error),
                "reason": reason_of(error),
                "step": trainer.state.global_step,
                "max_steps": trainer.state.max_steps,
                "log": trainer.state.log_history,
            }
        )
        if error is not broken:
            raise error from broken
        raise
    written.finish(results)
    return written.record


def _trained(trainer: RunTrainer, saved: Path, adapter: Mapping[str, Any], resume: bool, stop: Stop) -> dict[str, Any]:
    """Train, save into ``saved`` and evaluate. Return the results for ``run.json``."""
    trainer.add_callback(StopAfterStep(stop))
    trainer.add_callback(ShortRunLog)
    last = LastEvaluation()
    trainer.add_callback(last)
    clock = StepClock(lambda: trainer.n_tokens_read)
    trainer.add_callback(clock)
    with stop.deferred():
        trained = trainer.train(resume_from_checkpoint=resume or None)
        seconds = trainer.seconds_trained()
        with waits_told("saving"):
            save_trained(trainer, saved, adapter)
    results = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "stopped_early": trained.global_step < trainer.state.max_steps,
        "seconds": seconds,
        **clock.results(),
    }
    stop.check()
    if trainer.eval_dataset is not None:
        with waits_told("measuring the held-out rows"):
            metrics = last.of_trained(trainer.args, trainer.state) or trainer.evaluate()
        results |= {key: value for key, value in metrics.items() if key.startswith("eval_")}
    results["peak_bytes"] = high_water()
    history = trainer.state.log_history
    if is_main():
        draw_loss(history, saved.parent / "loss.png")
    return {"status": "finished", "results": results, "saved": str(saved), "log": history}


def _explained(error: BaseException, recipe: Recipe, step: int) -> BaseException:
    """Return the error to raise for a run that failed. The message of a GPU's failure adds the last checkpoint; that of
    an interrupt names the files that are left.
    """
    failure = gpu_failure(error)
    if failure is not None:
        kept = checkpoints(Path(recipe.output))
        left = f": {kept[-1].name} is whole, and --resume goes on from it" if kept else ", and no checkpoint is there"
        return type(failure)(f"{failure}. This happened after step {step}{left}")
    folder = checkpoint_folder(Path(recipe.output), step)
    if isinstance(error, Interrupted) and not error.args and folder.exists():
        left = f"{reason_of(error)} after step {step}: its checkpoint is written, and --resume goes on from it"
        error.args = (f"{left}. {usable(recipe, folder)}",)
    return error


def describe_run(recipe: Recipe, trainer: RunTrainer) -> dict[str, Any]:
    """Return the facts about a run that are known before it begins."""
    config, values = recipe.adapter_config(), recipe.model_dump()
    return {
        "format": 1,
        "recipe": values,
        "places": places_of(values),
        "files": files_of(recipe.data),
        "process": this_process(),
        "n_processes": n_processes(),
        "shard": recipe.distributed.copy_size(n_processes(), n_on_this_machine()),
        "parent": parent_of(recipe.adapter),
        "adapter_config": asdict(config) if is_dataclass(config) else None,
        "training": trainer.args.to_dict(),
        "trained": trainer.describe(),
        "n_trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "data": {
            "train": trainer.describe_rows(trainer.train_dataset),
            "eval": None if trainer.eval_dataset is None else trainer.describe_rows(trainer.eval_dataset),
        },
        "environment": environment(),
    }
