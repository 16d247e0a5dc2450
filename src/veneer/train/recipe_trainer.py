"""Builds the trainer of a recipe, with its rows, base and adapter. Nothing is trained here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

from datasets import Dataset, IterableDataset, are_progress_bars_disabled
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.contract.source import adapter_folder
from veneer.contract.targets import select_targets
from veneer.data.chat import with_template
from veneer.data.dataset import columns_of
from veneer.data.encoding import kind_of
from veneer.errors import ConfigError
from veneer.model.attach.attach import adapted_modules, module_index
from veneer.model.fused.decoder import fuse
from veneer.model.memory.heap import blocks_mapped
from veneer.model.sharded.sharding import BaseCutter, is_cut, leave_apart, shard_base
from veneer.plain.group import n_on_this_machine
from veneer.plain.progress import waits_told
from veneer.plain.tasks import TaskType
from veneer.recipe.adapter import FROM, differs_in_writing, not_that_adapter
from veneer.recipe.advice import odd_rate
from veneer.recipe.distributed_part import DistributedPart
from veneer.recipe.methods import adapter_config, usual_learning_rate
from veneer.recipe.readers import preference_reader
from veneer.recipe.recipe import Recipe
from veneer.recipe.tasks import OF_ANSWERS, trainer_of
from veneer.store.merge_record import require_not_merged
from veneer.store.source import load_tokenizer, resolve
from veneer.train.base_model import device_of, load_base
from veneer.train.library_errors import refusals_told
from veneer.train.preference.reward import for_scores
from veneer.train.processes import n_processes
from veneer.train.rows import Rows, answers_only, read_data
from veneer.train.run_trainer import RunTrainer
from veneer.train.task_metric import TaskMetric
from veneer.train.trained_model import adapted
from veneer.train.trainer import SFTTrainer

log = logging.getLogger(__name__)


def make_trainer(
    recipe: Recipe, model: PreTrainedModel | None = None, kind: type[RunTrainer] | None = None
) -> RunTrainer:
    """Return the trainer of a recipe, before any training. Rows are encoded; the model is loaded unless it is given.

    ``kind`` replaces the class of the task's trainer.

    Raises the errors of its parts, and CompositionError if the adapter whose training continues is already merged into
    the base.
    """
    require_not_in_base(recipe.adapter, recipe.model.source)
    data = recipe.data
    tokenizer = with_template(load_tokenizer(recipe.model.source), data.chat_template, data.response_template)
    if recipe.task not in OF_ANSWERS:
        return _make_task_trainer(recipe, tokenizer, model, kind)
    rows = read_data(recipe.data, recipe.seed)
    only = answers_only(recipe.data, kind_of(columns_of(rows.train), "text"))
    args = recipe.training_config(assistant_only_loss=only.assistant, completion_only_loss=only.completion)
    metric = None
    if recipe.metric is not None:
        metric = TaskMetric.of(recipe.metric, tokenizer, list(rows.eval or ()), _known(rows.train))
    cutter, frozen = _cutter(recipe.distributed, args) if model is None else None, recipe.method != "full"
    device = device_of(args)
    base = load_base(recipe.model, frozen=frozen, cutter=cutter, device=device) if model is None else model
    given = _with_adapter(recipe, base)
    with refusals_told(), _encoding_told(rows):
        trainer: Any = (kind or trainer_of(recipe.task))(
            given.model,
            args,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            peft_config=given.config,
        )
    trainer.task_metric = metric
    _tell_of_odd_settings(recipe.adapter, recipe.method, trainer)
    return cast(RunTrainer, trainer)


def _make_task_trainer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    kind: type[RunTrainer] | None,
) -> RunTrainer:
    """Return the trainer of a recipe whose task is preference tuning, a reward model, or learning from generated
    answers.
    """
    rows = read_data(recipe.data, recipe.seed, preference_reader(recipe.data, recipe.task))
    args = recipe.training_config()
    rewards = {"reward_funcs": recipe.reward_functions()[0]} if recipe.rewards else {}
    set_seed(recipe.seed)  # a new head is drawn
    if model is None:
        frozen, cutter = recipe.method != "full", _cutter(recipe.distributed, args)
        scores, device = recipe.task == "reward", device_of(args)
        model = load_base(recipe.model, scores=scores, frozen=frozen, cutter=cutter, device=device)
    given = _with_adapter(recipe, model)
    with refusals_told(), _encoding_told(rows, draws=bool(recipe.rewards)):
        trainer: Any = (kind or trainer_of(recipe.task))(
            given.model,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            peft_config=given.config,
            **rewards,
            **recipe.conversing(),
        )
    return cast(RunTrainer, trainer)


def _encoding_told(rows: Rows, *, draws: bool = False) -> AbstractContextManager[None]:
    """Enter a context that prints lines while the trainer attaches the adapter and tokenizes rows. In a terminal,
    datasets shows bars instead.

    ``draws``: the trainer generates its answers and tokenizes no row in advance. The lines then name the building of
    the trainer and its engine.
    """
    if draws:
        return waits_told("building the trainer, its rewards and its engine")  # no row is tokenized before a step
    if not are_progress_bars_disabled():
        return nullcontext()
    known = [part for part in (rows.train, rows.eval) if isinstance(part, Dataset)]
    n_rows = f"{sum(map(len, known)):,} rows" if known else "the rows"
    return waits_told(f"attaching the adapter and tokenizing {n_rows}")


def _with_adapter(recipe: Recipe, base: PreTrainedModel) -> _Given:
    """Return the model for a trainer, and the config of the adapter that the trainer must still attach, if any.

    A saved adapter, and every adapter of a sharded base, is attached here. A fresh adapter of a base that is not
    sharded is left to the trainer.
    """
    saved = FROM in recipe.adapter
    model = with_saved_adapter(recipe.adapter, recipe.task, base) if saved else base
    config = None if saved else recipe.adapter_config()
    shard = recipe.distributed.copy_size(n_processes(), n_on_this_machine())
    if shard == 1:
        return _Given(model, config)
    args = recipe.training_config()
    set_seed(recipe.seed)
    with blocks_mapped():
        model = adapted(model, for_scores(config) if recipe.task == "reward" else config)
        if args.fused == "auto":
            fuse(model)  # which verifies whole blocks: they stay fused from here on
    if is_cut(model):
        leave_apart(model)
    else:
        shard_base(model, shard, device=args.device.type)
    return _Given(model, None)


def _cutter(part: DistributedPart, args: Any) -> BaseCutter | None:
    """Return the object that shards a base while it is loaded, or None if each process has all of the base."""
    shard = part.copy_size(n_processes(), n_on_this_machine())
    return None if shard == 1 else BaseCutter(shard, args.device.type)


class _Given(NamedTuple):
    """Model and adapter config for a trainer. The config is None if the model has its adapter already."""

    model: PreTrainedModel
    config: MethodConfig | None


def with_saved_adapter(part: Mapping[str, Any], task: str, model: PreTrainedModel) -> PreTrainedModel:
    """Attach the adapter of ``adapter.from`` to a model for further training, and return the model.

    Raises ConfigError for an adapter of another kind of model than the task trains.
    """
    config = cast(MethodConfig, adapter_config(part))
    scores = config.task_type == TaskType.SEQ_CLS.value
    if scores != (task == "reward"):
        kind = "a reward model's" if scores else "a language model's"
        fits = "task: reward" if scores else "another task, or leave adapter.from out"
        raise ConfigError(f"adapter.from: the adapter in {part[FROM]} is {kind}: use {fits}")
    if differs_in_writing(part, getattr(config, "target_modules", None)):
        _require_same_modules(part, cast(Any, config), model)
    return cast(PreTrainedModel, PeftModel.from_pretrained(model, part[FROM], is_trainable=True, config=config))


def require_not_in_base(part: Mapping[str, Any], base: str) -> None:
    """Raise CompositionError if the adapter whose training continues was already merged into its base."""
    if FROM in part:
        require_not_merged(resolve(base), adapter_folder(part[FROM]))


def _require_same_modules(part: Mapping[str, Any], config: Any, model: PreTrainedModel) -> None:
    """Raise ConfigError if a saved adapter changes other modules than the recipe's target modules."""
    given, index = part["target_modules"], module_index(model, config)
    named = given if isinstance(given, str) else tuple(given)
    meant, own = (set(select_targets(each, index)) for each in (replace(config, target_modules=named), config))
    if meant != own:
        other = sorted(meant ^ own)
        differs = f"{part[FROM]} differs from that in {len(other)} modules, such as {other[0]}"
        raise ConfigError(not_that_adapter([f"adapter.target_modules: {given} here, and {differs}"]))


def _tell_of_odd_settings(part: Mapping[str, Any], method: str, trainer: SFTTrainer) -> None:
    """Warn about an unusual learning rate, and about an adapter on an output head that is tied to the embeddings."""
    odd = odd_rate(trainer.args.learning_rate, usual_learning_rate(part), method)
    if odd is not None:
        log.warning("%s", odd)
    head, inner = trainer.model.get_output_embeddings(), trainer.model.get_input_embeddings()
    tied = bool(getattr(trainer.model.config.get_text_config(), "tie_word_embeddings", False))
    adapted = list(adapted_modules(trainer.model).values())
    alone = any(m is head and m.adapters for m in adapted) and not any(m is inner for m in adapted)
    if tied and alone:
        log.warning(
            "adapter.target_modules matches the output head, which is tied to the embeddings: only the head is "
            "changed, and merging writes the two apart. all-linear leaves it out"
        )


def _known(rows: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """Return the rows if they are in memory, or an empty list for a stream."""
    return [] if isinstance(rows, IterableDataset) else list(rows)
