"""Tasks of a recipe, and the keys that belong to each, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import veneer
from veneer.recipe.key_checks import AllowedKeys

Task = Literal["sft", "dpo", "kto", "reward", "grpo", "rloo", "best_of", "distill"]
TASKS: tuple[Task, ...] = get_args(Task)
OF_ANSWERS: tuple[Task, ...] = ("sft", "distill")
"""Tasks whose rows hold answers, and are read alike."""

OF_SWEEPS: tuple[Task, ...] = ("sft", "grpo", "rloo")
"""Tasks whose runs can be members of a sweep."""

_ALL = frozenset({"prompt", "chat", "system"})


@dataclass(frozen=True, slots=True)
class TaskKeys:
    """Keys of one task in addition to those of all tasks.

    ``trainer`` and ``settings`` are veneer's names of the trainer and its config. The keys of ``training`` are the
    fields of that config. ``data``: keys of the part ``data``. ``rewards``: the task needs the part ``rewards``.
    ``rate``: its usual learning rate, divided by that of supervised fine-tuning with the same method.
    """

    trainer: str
    settings: str
    data: frozenset[str]
    rewards: bool = False
    rate: float = 1.0


KEYS: Mapping[Task, TaskKeys] = {
    "sft": TaskKeys("SFTTrainer", "SFTConfig", _ALL | {"completion", "train_on"}),
    "dpo": TaskKeys("DPOTrainer", "DPOConfig", _ALL, rate=0.1),
    "kto": TaskKeys("KTOTrainer", "KTOConfig", _ALL, rate=0.1),
    "reward": TaskKeys("RewardTrainer", "RewardConfig", _ALL),
    "grpo": TaskKeys("GRPOTrainer", "GRPOConfig", _ALL | {"response_template"}, rewards=True, rate=0.1),
    "rloo": TaskKeys("RLOOTrainer", "RLOOConfig", _ALL, rewards=True, rate=0.1),
    "best_of": TaskKeys("BestOfTrainer", "BestOfConfig", _ALL, rewards=True),
    "distill": TaskKeys("DistillTrainer", "DistillConfig", _ALL | {"completion"}),
}


def task_of(values: Mapping[str, Any]) -> Task:
    """Return the task in a recipe's values. Return sft if there is none, or an unknown one.

    Another check reports an unknown task.
    """
    given = values.get("task", "sft")
    return given if given in KEYS else "sft"


def settings_of(task: Task) -> Any:
    """Return the config class of a task's trainer."""
    return getattr(veneer, KEYS[task].settings)  # imported when it is first asked for


def home_of_settings(task: Task) -> tuple[str, str]:
    """Return the module of the config class of a task's trainer, and the name of the class."""
    name = KEYS[task].settings
    return veneer._HOMES[name], name


def trainer_of(task: Task) -> Any:
    """Return the trainer class of a task."""
    return getattr(veneer, KEYS[task].trainer)


def task_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of keys of other tasks, with the tasks that they belong to, and of missing rewards."""
    task = task_of(values)
    data = values.get("data")
    own = frozenset().union(*(keys.data for keys in KEYS.values()))
    for key in data if isinstance(data, Mapping) else ():
        if key in own - KEYS[task].data:
            yield f"data.{key}: {_belongs([t for t in TASKS if key in KEYS[t].data], task)}"
    rewards = values.get("rewards")
    if rewards and not KEYS[task].rewards:
        yield f"rewards: {_belongs([t for t in TASKS if KEYS[t].rewards], task)}"
    if values.get("rollouts") and not KEYS[task].rewards:
        yield f"rollouts: {_belongs([t for t in TASKS if KEYS[t].rewards], task)}"
    for key in ("tools", "environment"):
        if values.get(key) and task != "grpo":
            yield f"{key}: {_belongs(['grpo'], task)}"
    if KEYS[task].rewards and not rewards and not (task == "grpo" and values.get("environment")):
        yield f"rewards: is missing; {task} learns from rewards, such as [{{function: exact-match, column: answer}}]"
    if task not in OF_SWEEPS and "sweep" in values:
        again = "run the recipe once for each value (--set key=value --set output=…)"
        yield f"sweep: {_belongs([*OF_SWEEPS], task)}; {again}"


def training_problems(task: Task, given: Mapping[str, Any], settings: Callable[[Task], AllowedKeys]) -> dict[str, str]:
    """Return the problems of keys of ``training`` that only ``settings`` of other tasks have, by key."""
    strange = [key for key in given if key not in settings(task).types]
    others = {key: [name for name in TASKS if key in settings(name).types] for key in strange}
    return {key: f"training.{key}: {_belongs(names, task)}" for key, names in others.items() if names}


def _belongs(names: list[Any], task: Task) -> str:
    return f"belongs to task {', '.join(names)}, and the task here is {task}; drop it"
