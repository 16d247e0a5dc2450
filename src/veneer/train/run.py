"""A recipe carried out: load, read, train, evaluate, save, and write down what happened."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from veneer.adapters.card import tell_parent
from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.contract.source import adapter_folder
from veneer.contract.targets import select_targets
from veneer.core.tasks import TaskType
from veneer.data.chat import with_template
from veneer.data.dataset import columns_of
from veneer.data.encoding import Kind, kind_of
from veneer.data.preference import PreferenceReader
from veneer.data.rows import RowReader, load_rows, split_off, stream_rows
from veneer.data.sources import load_sources
from veneer.disk.folder import new_folder
from veneer.errors import ConfigError, DataError, DiskError, DivergedError, Interrupted, VeneerError
from veneer.model.attach import adapted_modules, module_index
from veneer.model.memory import high_water
from veneer.recipe.adapter import FROM, FULL, differs_in_writing
from veneer.recipe.advice import odd_rate
from veneer.recipe.changes import places_of
from veneer.recipe.methods import not_that_adapter, usual_learning_rate
from veneer.recipe.parts import DataPart
from veneer.recipe.recipe import Recipe
from veneer.recipe.tasks import trainer_of
from veneer.store.merge_record import require_not_merged
from veneer.store.source import load_tokenizer, require_hub, resolve
from veneer.train.base_model import load_base
from veneer.train.checkpoint import checkpoint_folder, holds_checkpoints, latest_checkpoint
from veneer.train.going_on import GoingOn, changes_since, files_of, is_complete, parent_of, with_data
from veneer.train.interrupt import Stop, StopAfterStep, listening
from veneer.train.library_errors import refusals_told
from veneer.train.processes import by_main, is_main, n_processes, together
from veneer.train.record import Written, life_of, record_of, require_over, this_process, told_life
from veneer.train.run_trainer import RunTrainer
from veneer.train.show.report import draw_loss, environment
from veneer.train.sources import sources_of
from veneer.train.task_metric import TaskMetric
from veneer.train.trainer import SFTTrainer

log = logging.getLogger(__name__)

ADAPTER, MODEL = "adapter", "model"  # the folders that a run saves
_SHUFFLED = 10_000  # streamed rows that are held to draw from
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """Training rows, and held-out rows where there are any."""

    train: Dataset | IterableDataset
    eval: Dataset | None


def read_data(part: DataPart, seed: int, reader: RowReader | PreferenceReader | None = None) -> Rows:
    """The rows that a recipe names. Raises DataError and ConfigError as `load_rows` and `split_off` do."""
    if reader is not None:
        train = load_rows(part.train, reader, part.limit)
    else:
        reader = RowReader(prompt=part.prompt, completion=part.completion, chat=part.chat, system=part.system)
        if part.streaming:
            streamed = stream_rows(part.train, reader).shuffle(seed=seed, buffer_size=_SHUFFLED)
            return Rows(streamed, None if part.eval is None else load_rows(part.eval, reader, part.eval_limit))
        train = load_sources(sources_of(part), seed, part.limit)
    if part.eval is not None:
        return Rows(train, load_rows(part.eval, reader, part.eval_limit))
    return Rows(*split_off(train, part.eval_fraction, seed)) if part.eval_fraction else Rows(train, None)


def _known(rows: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """The rows, where they are in memory."""
    return [] if isinstance(rows, IterableDataset) else list(rows)


class _Only(NamedTuple):
    """The parts that alone are trained: the completions, or the assistant's turns."""

    completion: bool
    assistant: bool


def answers_only(part: DataPart, kind: Kind) -> _Only:
    """The meaning of ``data.train_on`` for rows of a kind. Raises ConfigError if it is given and finds no answers."""
    if part.train_on == "answers" and kind == "text":
        if "train_on" in part.model_fields_set:
            raise ConfigError(
                "data.train_on: answers, and the rows are plain text, in which nothing tells answers apart: set it to "
                "everything, or give rows with messages, or with prompt and completion"
            )
        log.warning("the rows are plain text, so every token is trained; data.train_on: everything says so")
    answers = part.train_on == "answers"
    return _Only(answers and kind == "prompt-completion", answers and kind == "messages")


def make_trainer(
    recipe: Recipe, model: PreTrainedModel | None = None, kind: type[SFTTrainer] = SFTTrainer
) -> RunTrainer:
    """The trainer of a recipe, its data encoded and its model loaded where none is given; nothing is trained yet.

    Raises the errors of its parts, CompositionError where the adapter that is trained on is in the base already.
    """
    require_not_in_base(recipe)
    tokenizer = with_template(load_tokenizer(recipe.model.source), recipe.data.chat_template)
    if recipe.task != "sft":
        return _make_task_trainer(recipe, tokenizer)
    rows = read_data(recipe.data, recipe.seed)
    only = answers_only(recipe.data, kind_of(columns_of(rows.train), "text"))
    args = recipe.training_config(assistant_only_loss=only.assistant, completion_only_loss=only.completion)
    metric = None
    if recipe.metric is not None:
        metric = TaskMetric.of(recipe.metric, tokenizer, list(rows.eval or ()), _known(rows.train))
    base = load_base(recipe.model) if model is None else model
    given = base if FROM not in recipe.adapter else with_saved_adapter(recipe, base)
    with refusals_told():
        trainer = kind(
            given,
            args,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            peft_config=None if FROM in recipe.adapter else recipe.adapter_config(),
        )
    trainer.task_metric = metric
    _tell_of_odd_settings(recipe, trainer)
    return trainer


def preference_reader(recipe: Recipe) -> PreferenceReader:
    """The reader of the rows of a task that is not supervised fine-tuning."""
    data = recipe.data
    return PreferenceReader(task=cast(Any, recipe.task), prompt=data.prompt, chat=data.chat, system=data.system)


def _make_task_trainer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunTrainer:
    """The trainer of a recipe whose task is not supervised fine-tuning."""
    rows = read_data(recipe.data, recipe.seed, preference_reader(recipe))
    args = recipe.training_config()
    rewards = {"reward_funcs": recipe.reward_functions()[0]} if recipe.rewards else {}
    set_seed(recipe.seed)  # a new head is drawn
    base = load_base(recipe.model, scores=recipe.task == "reward")
    given = base if FROM not in recipe.adapter else with_saved_adapter(recipe, base)
    with refusals_told():
        trainer: RunTrainer = trainer_of(recipe.task)(
            given,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            peft_config=None if FROM in recipe.adapter else recipe.adapter_config(),
            **rewards,
        )
    return trainer


def with_saved_adapter(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapter of ``adapter.from``, to be trained on.

    Raises ConfigError for an adapter of another kind of model than the task trains.
    """
    config = cast(MethodConfig, recipe.adapter_config())
    scores = config.task_type == TaskType.SEQ_CLS.value
    if scores != (recipe.task == "reward"):
        kind = "a reward model's" if scores else "a language model's"
        fits = "task: reward" if scores else "another task, or leave adapter.from out"
        raise ConfigError(f"adapter.from: the adapter in {recipe.adapter[FROM]} is {kind}: use {fits}")
    if differs_in_writing(recipe.adapter, getattr(config, "target_modules", None)):
        _require_same_modules(recipe, cast(Any, config), model)
    return cast(
        PreTrainedModel, PeftModel.from_pretrained(model, recipe.adapter[FROM], is_trainable=True, config=config)
    )


def require_not_in_base(recipe: Recipe) -> None:
    """Raise CompositionError where the adapter that a recipe trains on was merged into its base."""
    if FROM in recipe.adapter:
        require_not_merged(resolve(recipe.model.source), adapter_folder(recipe.adapter[FROM]))


def _require_same_modules(recipe: Recipe, config: Any, model: PreTrainedModel) -> None:
    """Raise ConfigError if a saved adapter acts on other modules than the recipe's target modules mean."""
    given, index = recipe.adapter["target_modules"], module_index(model, config)
    named = given if isinstance(given, str) else tuple(given)
    meant, own = (set(select_targets(each, index)) for each in (replace(config, target_modules=named), config))
    if meant != own:
        other = sorted(meant ^ own)
        differs = f"{recipe.adapter[FROM]} differs from that in {len(other)} modules, such as {other[0]}"
        raise ConfigError(not_that_adapter([f"adapter.target_modules: {given} here, and {differs}"]))


def _tell_of_odd_settings(recipe: Recipe, trainer: SFTTrainer) -> None:
    """Warn of a rate far from the usual, and of an adapter on an output head that is tied to the embeddings."""
    odd = odd_rate(trainer.args.learning_rate, usual_learning_rate(recipe.adapter), recipe.method)
    if odd is not None:
        log.warning("%s", odd)
    head, inner = trainer.model.get_output_embeddings(), trainer.model.get_input_embeddings()
    tied = bool(getattr(trainer.model.config.get_text_config(), "tie_word_embeddings", False))
    adapted = list(adapted_modules(trainer.model).values())
    alone = any(m is head and m.adapters for m in adapted) and not any(m is inner for m in adapted)
    if tied and alone:
        log.warning(
            "adapter.target_modules catches the output head, which is tied to the embeddings: it alone is changed, and "
            "merging writes the two apart. all-linear leaves it out"
        )


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    planned: Mapping[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Carry a recipe out and give back what ``run.json`` holds, what was ``planned`` and measured of memory among it.

    Writes into the recipe's output: ``adapter/`` (``model/`` for a model trained whole), ``run.json``, ``loss.png``,
    checkpoints and TensorBoard's files. Raises the errors of its parts; ConfigError also where the output holds a run
    already and ``resume`` is false, where a process trains in it, and where a run would go on with other settings or
    data than it was begun with (``allow_changes`` takes them, and writes down what changed at which step); DiskError
    where it cannot be made. A resume that is refused leaves the run as it was, and one of a run that is finished
    changes nothing. SIGTERM and SIGINT end the step in progress and write a checkpoint: Interrupted.
    """
    output = Path(recipe.output)
    args = recipe.training_config()
    if args.push_to_hub:
        require_hub()
    _ = args.device  # several processes meet here
    with listening() as stop, together():
        made = by_main(lambda: not output.exists())
        by_main(lambda: require_free(recipe, resume))
        before = by_main(lambda: record_of(output)) if resume else None
        found = changes_since(before, recipe, allow_changes) if before is not None else []
        if before is not None and is_complete(before, recipe):
            tell(f"{output} holds this run, already finished: nothing is changed")
            return before
        if before is not None and life_of(before) != "over":
            tell(f"{output}: {told_life(before)}; going on from its last checkpoint")
        with _taken_back(output, made):
            if resume:
                by_main(lambda: latest_checkpoint(output))  # told before a model is loaded
            trainer = make_trainer(recipe)
        going_on = GoingOn(before, found, allow_changes) if resume else None
        return carry_out(recipe, trainer, going_on=going_on, stop=stop, planned=planned, tell=tell)


@contextmanager
def _taken_back(output: Path, made: bool) -> Iterator[None]:
    """Around what may be refused: an output folder that was made for it goes again."""
    try:
        yield
    except BaseException:
        if made and is_main():
            with suppress(OSError):  # something was put into it
                output.rmdir()
        raise


def require_free(recipe: Recipe, resume: bool) -> None:
    """As `require_fresh` for a recipe's output; data files that are not there are told in the same error."""
    try:
        require_fresh(Path(recipe.output), resume)
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *recipe.data.missing_files])) from error


def require_data_files(part: DataPart) -> None:
    """Raise DataError with all files of rows that are named and not there."""
    if part.missing_files:
        raise DataError("; ".join(part.missing_files))


def require_fresh(output: Path, resume: bool) -> None:
    """Make the folder. Raises ConfigError where a process trains in it, where a new run would be mixed up with one that
    is there, or would write over what it saved, DiskError where it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"the output folder {output} cannot be made ({error.strerror}): choose another") from error
    record = record_of(output)
    if record is not None:
        require_over(record, output)
    if resume:
        return
    saved = [name for name in (ADAPTER, MODEL) if (output / name).exists()]
    further = "; adapter.from trains its adapter on, in another output" if saved[:1] == [ADAPTER] else ""
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


def require_begun(recipe: Recipe) -> None:
    """Raise TrainingError where no run can go on: none is finished in the recipe's output, and there is no checkpoint;
    DataError where files of the rows that it is to go on with are not there.
    """
    record = record_of(Path(recipe.output))
    if record is None or record["status"] != "finished":
        latest_checkpoint(Path(recipe.output))
        require_data_files(recipe.data)


class Begun(TrainerCallback):  # type: ignore[misc]
    """Says at which step training begins, when all that a checkpoint could be refused for lies behind it."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand on the step, 0 or that of the checkpoint, in Trainer's event."""
        self._begin(state.global_step)


class LastEvaluation(TrainerCallback):  # type: ignore[misc]
    """Remembers the last evaluation of a run, and after which step it was.

    A recipe gives one dataset to evaluate on. Of several each would be an evaluation, and the last one be remembered.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._metrics: Mapping[str, Any] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        """Take down an evaluation, in Trainer's event."""
        self._step, self._metrics = state.global_step, metrics

    def of_trained(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """Its metrics where it saw the weights that training ended with; None where it saw others, or none was."""
        others = args.load_best_model_at_end and state.best_global_step not in (None, state.global_step)
        return None if others or self._step != state.global_step else self._metrics


def carry_out(
    recipe: Recipe,
    trainer: RunTrainer,
    *,
    going_on: GoingOn | None = None,
    stop: Stop | None = None,
    planned: Mapping[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """`run_recipe` with a trainer that has been made. A run that breaks off leaves in ``run.json`` how it ended, after
    which step, why (``reason``) and its log; one that is refused before it trains leaves there what it found.
    """
    tell(trainer.describe())
    record = describe_run(recipe, trainer) | ({} if planned is None else {"plan": dict(planned)})
    if going_on is not None:
        going_on = with_data(going_on, record)
        trainer.other_data = going_on.allow_changes
        trainer.other_settings = bool(going_on.changes)
    written = Written(Path(recipe.output), record, None if going_on is None else going_on.recorded)
    if going_on is None:
        written.begin(0)
    else:
        trainer.add_callback(Begun(written.begin))
    try:
        with together():
            results = _trained(recipe, trainer, going_on is not None, stop or Stop())
    except BaseException as error:
        _explain(error, trainer, Path(recipe.output))
        written.end(
            {
                "status": _ending(error),
                "reason": _reason(error),
                "step": trainer.state.global_step,
                "log": trainer.state.log_history,
            }
        )
        raise
    written.finish(results)
    return written.record


def _trained(recipe: Recipe, trainer: RunTrainer, resume: bool, stop: Stop) -> dict[str, Any]:
    """Train, save and evaluate; what ``run.json`` holds of that."""
    output = Path(recipe.output)
    saved = output / (MODEL if recipe.method == FULL else ADAPTER)
    trainer.add_callback(StopAfterStep(stop))
    last = LastEvaluation()
    trainer.add_callback(last)
    began = time.perf_counter()
    with stop.deferred():
        trained = trainer.train(resume_from_checkpoint=resume or None)
        seconds = time.perf_counter() - began
        _save(recipe, trainer, saved)
    results = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "stopped_early": trained.global_step < trainer.state.max_steps,
        "seconds": seconds,
    }
    stop.check()
    if trainer.eval_dataset is not None:
        metrics = last.of_trained(trainer.args, trainer.state) or trainer.evaluate()
        results |= {key: value for key, value in metrics.items() if key.startswith("eval_")}
    results["peak_bytes"] = high_water()
    history = trainer.state.log_history
    if is_main():
        draw_loss(history, output / "loss.png")
    return {"status": "finished", "results": results, "saved": str(saved), "log": history}


def _save(recipe: Recipe, trainer: RunTrainer, folder: Path) -> None:
    """Write what was trained, whole or not at all, and upload the run's folder where that is asked for."""
    if is_main():
        with new_folder(folder) as scratch:
            trainer.save_model(str(scratch), _internal_call=True)
            parent = parent_of(recipe)
            if parent is not None:
                tell_parent(scratch, parent)
    else:
        trainer.save_model(str(folder), _internal_call=True)  # which takes part, and writes nothing
    if trainer.args.push_to_hub:  # once it stands under its name
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def _explain(error: BaseException, trainer: RunTrainer, output: Path) -> None:
    """Put into an interrupt what is left of the run."""
    step = trainer.state.global_step
    if isinstance(error, Interrupted) and not error.args and checkpoint_folder(output, step).exists():
        name = signal.Signals(error.number).name
        error.args = (f"{name} after step {step}: its checkpoint is written, and --resume goes on from it",)


def _ending(error: BaseException) -> str:
    if isinstance(error, DivergedError):
        return "diverged"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _reason(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return signal.Signals(error.number).name
    if isinstance(error, VeneerError):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def describe_run(recipe: Recipe, trainer: RunTrainer) -> dict[str, Any]:
    """The facts of a run before it begins."""
    config = recipe.adapter_config()
    return {
        "format": 1,
        "recipe": recipe.model_dump(),
        "places": places_of(recipe),
        "files": files_of(recipe.data),
        "process": this_process(),
        "n_processes": n_processes(),
        "parent": parent_of(recipe),
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
