"""Part ``sweep`` of a recipe: the values of each member, which are then read as recipes."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listed
from veneer.recipe.key_checks import perhaps
from veneer.recipe.tasks import task_of, task_problems
from veneer.recipe.values import beside, is_place, put

PART = "sweep"
_RUNS = ("members", "grid")
KEYS = {
    "members": "list of changes, such as {name: small, adapter.r: 4}",
    "grid": "list of values for each key; every combination is a member",
    "engine": "process or ray: the members share one pass in this process, or train on the workers of a Ray cluster",
    "scheduler": "none, or asha, which stops members early",
    "reduction": "for asha: after each comparison, one in this many members goes on training, by default 3",
}
HOW = ("engine", "scheduler", "reduction")  # fields of `train.sweep.recipe.Sweep`
ENGINES, SCHEDULERS = ("process", "ray"), ("none", "asha")
REDUCTION = 3  # the usual one
_NAME = re.compile(r"[\w.+-]+")
# Settings of the one pass over the base.
_SHARED_TRAINING = (
    "bf16", "fp16", "tf32", "use_cpu", "fused", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "use_vllm", "vllm_max_model_length",
)  # fmt: skip
_WHY_SHARED = "cannot vary: all members share one pass over one base. Set it for all, outside of sweep"


@dataclass(frozen=True)
class MemberValues:
    """One run of a sweep: its name, its changes, and the values of its recipe as a single run."""

    name: str
    changes: Mapping[str, Any]
    values: Mapping[str, Any]


def members_of(values: Mapping[str, Any], source: Path) -> tuple[list[MemberValues], list[str]]:
    """Return the members of a recipe with a ``sweep`` part, and the problems of their names and changes.

    Raises ConfigError if the part itself is wrong, so that there are no members.
    """
    base = {key: value for key, value in values.items() if key != PART}
    part = values[PART]
    of_task = (told for told in task_problems(values) if told.startswith(PART))
    problems = [*_part_problems(part), *_task_problems(part, task_of(values)), *of_task]
    if problems:
        raise ConfigError(listed(problems, str(source)))
    changes = [_located(each, source) for each in _changes(part)]
    names = [str(each.pop("name")) if "name" in each else _name_of(each) for each in changes]
    problems = _key_problems(changes) + _name_problems(names)
    members = []
    for name, each in zip(names, changes, strict=True):
        try:
            members.append(MemberValues(name, each, _values(base, name, each)))
        except ConfigError as error:
            problems.append(str(error))
    return members, problems


def _values(base: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a member ``name``: the ``base`` with the member's changes, and an output folder of its own.

    Raises ConfigError for a key such as ``a.b`` if ``a`` is not a mapping.
    """
    values = copy.deepcopy(dict(base))
    for key, value in changes.items():
        put(values, str(key), value)
    if isinstance(values.get("output"), str):
        values["output"] = str(Path(values["output"]) / name)
    return values


def _part_problems(part: Any) -> list[str]:
    no_runs = ["sweep: must hold members (a list of changes), grid (a list of values for each key), or both"]
    if not isinstance(part, Mapping) or not part:
        return no_runs
    known = tuple(KEYS)
    found = [] if any(key in part for key in _RUNS) else no_runs
    found += [f"sweep.{key}: unknown key{perhaps(str(key), known)}" for key in part if key not in known]
    found += _how_problems(part)
    members, grid = part.get("members", [{}]), part.get("grid", {})
    if not isinstance(members, list) or not members or not all(isinstance(each, Mapping) for each in members):
        found.append("sweep.members: must be a list of changes, such as {name: small, adapter.r: 4}")
    if not isinstance(grid, Mapping):
        return [*found, "sweep.grid: must give a list of values for each key, such as adapter.r: [4, 8]"]
    return found + [
        f"sweep.grid.{key}: {value!r} must be a list of values to try"
        for key, value in grid.items()
        if not isinstance(value, list) or not value
    ]


def _how_problems(part: Mapping[str, Any]) -> list[str]:
    """Return the problems of the keys ``engine``, ``scheduler`` and ``reduction``."""
    found = [
        f"sweep.{key}: {part[key]!r} is unknown: it is one of {', '.join(allowed)}. Take one of them."
        for key, allowed in (("engine", ENGINES), ("scheduler", SCHEDULERS))
        if key in part and part[key] not in allowed
    ]
    reduction = part.get("reduction", REDUCTION)
    if not isinstance(reduction, int) or isinstance(reduction, bool) or reduction < 2:
        found.append(f"sweep.reduction: {reduction!r} is no whole number of at least 2. Take {REDUCTION}.")
    if "reduction" in part and part.get("scheduler", "none") == "none":
        found.append("sweep.reduction: only the scheduler asha reads it. Add scheduler: asha, or leave it out.")
    return found


def _task_problems(part: Any, task: str) -> list[str]:
    if not isinstance(part, Mapping) or part.get("scheduler") != "asha" or task == "sft":
        return []
    return [
        f"sweep.scheduler: asha compares members by their loss, which says nothing of {task}'s rewards. Drop it, and "
        "compare the members' rewards at the end."
    ]


def _changes(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of each member: every entry of the list combined with every point of the grid."""
    grid: Mapping[str, Sequence[Any]] = part.get("grid", {})
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    found = []
    for member, point in itertools.product(part.get("members", [{}]), points):
        each = {**member, **point}
        if "name" in member and grid:
            each["name"] = f"{member['name']}_{_name_of(point)}"
        found.append(each)
    return found


def _located(changes: Mapping[str, Any], source: Path) -> dict[str, Any]:
    return {key: beside(source, value) if is_place(key, value) else value for key, value in changes.items()}


def _name_of(changes: Mapping[str, Any]) -> str:
    """Return a name for changed keys, such as ``r-8_learning_rate-0.001``."""
    words = (f"{str(key).rpartition('.')[2]}-{_short(value)}" for key, value in changes.items())
    return "_".join(words)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(_short(each) for each in value.values())
    if isinstance(value, list):
        return "+".join(_short(each) for each in value)
    text = (
        Path(value).stem if isinstance(value, str) and value.endswith((".jsonl", ".json", ".parquet")) else str(value)
    )
    return re.sub(r"[^\w.+-]+", "-", text)


def _key_problems(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for key in dict.fromkeys(str(key) for each in changes for key in each):
        section, _, field = key.partition(".")
        if section == "model" or (section == "training" and field in _SHARED_TRAINING):
            found.append(f"sweep: {key} {_WHY_SHARED}")
        elif section == "task":
            found.append("sweep: task cannot vary: all members share one pass or one engine. Write a recipe for each")
        elif section == "output":
            found.append("sweep: output cannot vary: every member has a folder of its name in the one output")
    return found


def _name_problems(names: Sequence[str]) -> list[str]:
    found = [
        f"sweep: the name {name!r} must be made of letters, digits and . _ + -: it names a folder"
        for name in names
        if not _NAME.fullmatch(name)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    return found + ([f"sweep: several members are called {twice}: give each a name of its own"] if twice else [])
