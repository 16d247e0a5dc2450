"""Training run as a YAML file, checked as a whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from veneer.contract import MethodConfig
from veneer.errors import ConfigError, listed
from veneer.plain.group import group_size
from veneer.recipe import openenv
from veneer.recipe.adapter import FROM, method_of
from veneer.recipe.advice import in_recipe_words, value_problems
from veneer.recipe.distill_checks import teacher_prompt
from veneer.recipe.distributed_part import ROWS_OF_A_PROCESS, dealing_problems
from veneer.recipe.key_checks import keys_of, typed
from veneer.recipe.methods import adapter_config, imported, name_of, usual_learning_rate
from veneer.recipe.optimizers import steps_in_backward
from veneer.recipe.parts import DistillPart, RolloutsPart, Written
from veneer.recipe.problems import problems_of
from veneer.recipe.rewards import named_function, reward_function
from veneer.recipe.tasks import KEYS, OF_ANSWERS, settings_of
from veneer.recipe.values import put, read_values

# What transformers, TRL and torch raise for settings that they do not take.
LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    OSError,
)


class Recipe(Written):
    """Settings of a whole run.

    ``adapter`` holds ``method`` and fields of its config, or ``from``, a saved adapter to train further. ``training``
    holds fields of the task's config (`tasks.KEYS`), ``rewards`` the reward functions.
    """

    @property
    def method(self) -> str:
        """Name of the method."""
        config = self.adapter_config() if FROM in self.adapter else None
        return method_of(self.adapter) if config is None else name_of(config)

    def adapter_config(self) -> MethodConfig | None:
        """Return the config of the adapter; None if the whole model is trained."""
        return adapter_config(self.adapter)

    def training_config(self, **changes: Any) -> Any:
        """Return the settings of the task's trainer, with the recipe's defaults filled in."""
        kind = settings_of(self.task)
        given = typed(keys_of(kind), self.training, [])
        rows = given.get("per_device_train_batch_size", ROWS_OF_A_PROCESS)
        dealt = self.distributed.accumulation(rows, _n_processes())
        return kind(output_dir=self.output, seed=self.seed, **{**_defaults(self), **given, **dealt, **changes})

    def reward_functions(self) -> tuple[list[Any], list[float]]:
        """Return the functions of ``rewards`` with their weights. Raises ConfigError for those that cannot be found."""
        named = [{"function": each} if isinstance(each, str) else dict(each) for each in self.rewards]
        weights = [float(each.pop("weight", 1.0)) for each in named]
        return [reward_function(each.pop("function"), each) for each in named], weights

    def conversing(self) -> dict[str, Any]:
        """Return the trainer's arguments for conversations: tools and environments.

        Raises ConfigError for those that cannot be found.
        """
        tools = {"tools": [named_function(each, "tools") for each in self.tools]} if self.tools else {}
        if self.environment is None:
            return tools
        if self.environment.startswith(openenv.PREFIX):
            return {**tools, "environment_factory": openenv.served(self.environment.removeprefix(openenv.PREFIX))}
        return {**tools, "environment_factory": named_function(self.environment, "environment")}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe from YAML, with ``key.key=value`` overrides on top.

    Relative paths in the file start at its folder. Relative paths in overrides, and that of the output, start at the
    working directory. Raises ConfigError with all problems at once. An unknown key is a problem, reported with the
    nearest known key.
    """
    return parse_recipe(read_values(path, overrides), str(path))


def parse_recipe(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Return a recipe from plain values. Raises ConfigError with all problems at once."""
    recipe, problems = checked_recipe(values)
    if recipe is None:
        raise ConfigError(listed(problems, name))
    return recipe


def checked_recipe(values: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """Return a recipe from plain values, or None and all problems."""
    problems, odd = problems_of(values, imported()), value_problems(values)
    problems += dealing_problems(values, _n_processes())
    if problems:
        return None, [*problems, *odd]
    recipe, problems = Recipe.model_validate(values), odd
    for build in (recipe.adapter_config, recipe.training_config, recipe.reward_functions, recipe.conversing):
        try:
            build()
        except ConfigError as error:
            problems.append(str(error))
        except LIBRARY_ERRORS as error:  # of transformers and TRL, about arguments
            problems.append(f"training: {in_recipe_words(str(error))}")
    return None if problems else recipe, problems


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with keys such as ``training.max_length``, or whole parts, changed. Raises ConfigError if the
    result is not a valid recipe.
    """
    values = recipe.model_dump(exclude_unset=True)
    for key, value in changes.items():
        put(values, key, value)
    return parse_recipe(values)


def _n_processes() -> int:
    """Return the number of processes that train together, even before they have joined their group."""
    met = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if met else group_size()


def _of_rollouts(part: RolloutsPart) -> dict[str, Any]:
    return {"rollout_engine": part.engine, "rollout_journal": part.journal, "rollout_memory": part.memory}


def _of_teacher(part: DistillPart) -> dict[str, Any]:
    text = "" if part.teacher_prompt is None else teacher_prompt(part.teacher_prompt)
    return {"teacher": part.teacher, "teacher_prompt": text}


def _defaults(recipe: Recipe) -> dict[str, Any]:
    evaluates = recipe.data.holds_out
    return {
        "bf16": False if recipe.model.dtype == "float32" else None,  # None: under autocast, as TRL trains
        "learning_rate": usual_learning_rate(recipe.adapter) * KEYS[recipe.task].rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 0.0 if steps_in_backward(recipe.training.get("optim")) else 0.3,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": ROWS_OF_A_PROCESS,
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": 200 if evaluates else None,
        "eval_on_start": evaluates and recipe.task in OF_ANSWERS,
        "gradient_checkpointing": False,
        "report_to": ["tensorboard"],
        **(_of_teacher(recipe.distill) if recipe.distill else {}),
        **({"reward_weights": recipe.reward_functions()[1]} if recipe.rewards else {}),
        **(_of_rollouts(recipe.rollouts) if KEYS[recipe.task].rewards else {}),
    }
