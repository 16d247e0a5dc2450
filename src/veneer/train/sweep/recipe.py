"""Reads the members of a sweep as recipes, and checks the settings that they must share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listed
from veneer.recipe.adapter import FULL
from veneer.recipe.optimizers import steps_in_backward
from veneer.recipe.recipe import Recipe, checked_recipe
from veneer.recipe.sweep_part import HOW, PART, REDUCTION, members_of

# Settings that act on a whole model of its own.
_UNSHARED = ("torch_compile", "deepspeed", "fsdp", "neftune_noise_alpha", "activation_offloading", "push_to_hub")


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its name, its changes, and its recipe as a single run."""

    name: str
    changes: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """Runs that train together over one base. ``output`` holds a folder for each.

    If ``scheduler`` is "asha", about one in ``reduction`` of the members goes on training after each rung.
    """

    members: tuple[Member, ...]
    output: Path
    engine: str = "process"
    scheduler: str = "none"
    reduction: int = REDUCTION


def parse_sweep(values: Mapping[str, Any], source: Path) -> Sweep:
    """Return the members of a recipe with a ``sweep`` part.

    ``members`` lists changes (``{name: …, adapter.r: 8}``), ``grid`` gives a list of values for each key. With both,
    every member of the list is combined with every point of the grid. ``engine``, ``scheduler`` and ``reduction`` are
    fields of `Sweep`. Raises ConfigError with all problems at once.
    """
    given, problems = members_of(values, source)
    members = []
    for each in given:
        recipe, own = checked_recipe(each.values)
        problems += own
        if recipe is not None:
            members.append(Member(each.name, each.changes, recipe))
    how = {key: values[PART][key] for key in HOW if key in values[PART]}
    problems += _member_problems(members, how.get("scheduler", "none"))
    if problems:
        raise ConfigError(listed(problems, str(source)))
    return Sweep(tuple(members), Path(str(values["output"])), **how)


def _member_problems(members: Sequence[Member], scheduler: str) -> list[str]:
    found = []
    for member in members:
        training = member.recipe.training
        if scheduler != "none" and training.get("save_only_model"):
            found.append(
                f"sweep: {member.name}: training.save_only_model saves no optimizer state, from which a member goes on "
                "after a rung: drop it"
            )
        if member.recipe.method == FULL:
            found.append(f"sweep: {member.name}: method full trains the base itself, which all members share")
        if steps_in_backward(training.get("optim")):
            found.append(
                f"sweep: {member.name}: training.optim {training['optim']} updates weights within the backward pass, "
                "which all members share"
            )
        found += [
            f"sweep: training.{key} acts on a model that a run has for itself, and members share theirs: drop it"
            for key in _UNSHARED
            if training.get(key)
        ]
    if any(member.recipe.model.attention == "flash_attention_2" for member in members):
        found.append(
            "sweep: model.attention flash_attention_2 takes one row at a time, and members share rows: use sdpa"
        )
    return found
