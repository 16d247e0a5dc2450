"""Differences between the recipe that a run was begun with and the one that it would be resumed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from veneer.contract import MethodConfig
from veneer.errors import ConfigError, listed
from veneer.recipe.recipe import Recipe
from veneer.recipe.values import PLACES, is_place

# The one place that says which keys no weight depends on. A key that is not listed counts as one that the weights
# depend on, a new key too.
HARMLESS = frozenset(
    {
        "output",
        "data.train",  # where the rows are; their content is compared by its hash
        "data.eval",
        "training.eval_on_start",
        *(
            f"training.{key}"
            for key in (
                # what is logged, shown, reported and sent
                "disable_tqdm", "include_num_input_tokens_seen", "log_level", "log_level_replica", "log_on_each_node",
                "logging_first_step", "logging_steps", "logging_strategy", "project", "report_to", "run_name",
                "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
                "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
                "push_to_hub",
                # time and memory: same numbers, bit for bit
                "activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading",
                "gradient_checkpointing", "gradient_checkpointing_kwargs",
                "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
                "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc", "ddp_timeout",
                "eval_accumulation_steps", "per_device_eval_batch_size", "skip_memory_metrics",
                "torch_empty_cache_steps",
            )
        ),
    }
)  # fmt: skip
# When it is evaluated and saved: harmless as long as no evaluation decides when training stops or what it keeps.
WITHOUT_CHOICE = frozenset(
    f"training.{key}"
    for key in (
        "do_eval", "eval_delay", "eval_steps", "eval_strategy", "save_on_each_node", "save_only_model",
        "save_steps", "save_strategy", "save_total_limit",
    )
)  # fmt: skip
# How long: harmless where the rate of no step, and nothing else, depends on the number of all steps.
LENGTH = frozenset({"training.max_steps", "training.num_train_epochs"})

_SAID_ELSEWHERE = ("output_dir", "seed", "local_rank", "resume_from_checkpoint", "teacher")
_HIDDEN = ("eos_token", "pad_token")  # `to_dict` hides what may be secret


@dataclass(frozen=True, slots=True)
class ChangedSetting:
    """One setting whose value has changed."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before} before, {self.now} now"


def changes(before: Recipe, now: Recipe, places: Mapping[str, str] | None = None) -> list[ChangedSetting]:
    """Return every changed setting on which the weights depend, with defaults filled in.

    ``places``: the paths of the sources of ``before`` at the time of its run, from `places_of`. Another name for the
    same path is then not a change.
    """
    old, new = settings(before), settings(now)
    if places is not None:
        old, new = {**old, **places}, {**new, **places_of(now.model_dump())}
    chooses = _chooses(old) or _chooses(new)
    metric = frozenset() if chooses else frozenset(key for key in {*old, *new} if key.startswith("metric."))
    harmless = HARMLESS | metric | (frozenset() if chooses else WITHOUT_CHOICE)
    grows = _any_length(before.adapter_config(), old) and _any_length(now.adapter_config(), new)
    harmless |= LENGTH if grows else frozenset()
    return [
        ChangedSetting(key, old.get(key), new.get(key))
        for key in sorted({*old, *new} - harmless)
        if old.get(key) != new.get(key)
    ]


def is_longer(before: Recipe, now: Recipe) -> bool:
    """Return True if the run now takes more steps or epochs than before, or if only one of the two is
    limited by steps.
    """
    old, new = (settings(recipe) for recipe in (before, now))
    steps, epochs = ([each[f"training.{key}"] for each in (old, new)] for key in ("max_steps", "num_train_epochs"))
    if steps[0] > 0 and steps[1] > 0:  # where steps are given, epochs do not count
        return bool(steps[1] > steps[0])
    return bool(epochs[1] > epochs[0]) if max(steps) <= 0 else True


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a run by the keys of a recipe, such as ``training.learning_rate``, given or default."""
    config, args = recipe.adapter_config(), recipe.training_config()
    training = {**args.to_dict(), **{key: getattr(args, key) for key in _HIDDEN if hasattr(args, key)}}
    parts = {
        "model": recipe.model.model_dump(),
        "data": recipe.data.model_dump(),
        "adapter": {
            "method": recipe.method,
            "from": recipe.adapter.get("from"),
            **(asdict(config) if is_dataclass(config) else {}),
        },
        "distill": {"teacher": recipe.distill.teacher} if recipe.distill else {},
        "metric": {} if recipe.metric is None else recipe.metric.model_dump(),
        "training": {key: value for key, value in training.items() if key not in _SAID_ELSEWHERE},
    }
    flat = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    own = {"task": recipe.task, "rewards": recipe.rewards, "seed": recipe.seed, "output": recipe.output}
    return {**flat, **own, "tools": recipe.tools, "environment": recipe.environment}


def places_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the absolute path of each source in a recipe, by its key. A name on the hub is returned unchanged.

    If the teacher is the base itself, it has no entry.
    """
    named = {f"{part}.{key}": (values[part] or {}).get(key) for part, key in PLACES}
    given = {key: str(name) for key, name in named.items() if name and is_place(key, name)}
    return {key: str(Path(name).resolve()) if Path(name).exists() else name for key, name in given.items()}


def refuse(found: Iterable[ChangedSetting], output: Path) -> None:
    """Raise ConfigError with all changes, if there are any."""
    found = list(found)
    another = next((each for each in found if each.key == "task"), None)
    if another is not None:  # most of the others are then defaults of the tasks
        raise ConfigError(
            f"{output} holds a run of task {another.before}, and this recipe is of task {another.now}: start a new run "
            "in another output (--set output=…), or take the recipe of that run"
        )
    if found:
        raise ConfigError(
            listed(
                map(str, found),
                f"the run in {output} was begun with different settings",
                remedy="Take the old ones, start a new run in another output (--set output=…), or go on with the new "
                "ones with --allow-changes, which writes down what changed at which step",
            )
        )


def _chooses(values: Mapping[str, Any]) -> bool:
    """Return True if an evaluation decides when training stops or which weights are kept."""
    return bool(
        values["training.load_best_model_at_end"]
        or values["training.early_stopping_patience"]
        or values["training.lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
        or values["training.save_strategy"] == "best"
    )


def _any_length(config: MethodConfig | None, values: Mapping[str, Any]) -> bool:
    """Return True if a run's first steps do not depend on how many steps follow, so that a finished run can be made
    longer.
    """
    minds_length = config is not None and config.training is not None and bool(config.training.fields_for(1))
    return not minds_length and values["training.lr_scheduler_type"] == "constant"
