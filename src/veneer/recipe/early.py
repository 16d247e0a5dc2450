"""Checks a recipe before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listed
from veneer.plain.group import group_size
from veneer.recipe.advice import value_problems
from veneer.recipe.base_modules import target_problems
from veneer.recipe.declared_in_source import UnreadableError
from veneer.recipe.distributed_part import dealing_problems
from veneer.recipe.key_places import key_places
from veneer.recipe.known import declared
from veneer.recipe.parts import DataPart
from veneer.recipe.problems import problems_of
from veneer.recipe.saved import saved_problems
from veneer.recipe.source_part import SourcePart
from veneer.recipe.sweep_part import PART, members_of
from veneer.recipe.values import section


def refuse_early(
    values: Mapping[str, Any],
    name: str = "recipe",
    overrides: Sequence[str] = (),
    *,
    begins: bool = False,
    n_processes: int | None = None,
) -> None:
    """Raise ConfigError with all problems of a recipe's values that show without importing torch: from the values, the
    source of installed packages and the headers of files.

    For a sweep, it reports the problems of all members. ``begins``: a run begins, so missing files of rows are problems
    too. ``name``: the recipe's file, in which problems are told by line, and the ``overrides`` of its keys. If the
    output exists, `train.output` reports them together with the problems of the output. ``n_processes`` are
    to train: by default, those that a launcher has started.
    """
    runs, found = [values], list[str]()
    if PART in values:
        members, found = members_of(values, Path(name))
        runs = [each.values for each in members]
    for run in runs:
        found += dealing_problems(run, n_processes or group_size())
        with suppress(UnreadableError):
            found += [*problems_of(run, declared()), *value_problems(run)]
            found += saved_problems(section(run, "adapter"), declared().methods)
        with suppress(UnreadableError):
            found += target_problems(run)
    rows = [told for run in runs for told in missing_rows(run)] if begins else []
    if found or (rows and not Path(str(values.get("output"))).exists()):
        raise ConfigError(listed(map(key_places(Path(name), overrides).told, [*found, *rows]), name))


def missing_rows(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of files of rows that do not exist, whatever else is wrong with ``data``."""
    data = section(values, "data")
    train, held_out = (data[key] if isinstance(data.get(key), str) else None for key in ("train", "eval"))
    more = data["more"] if isinstance(data.get("more"), list) else []
    sources = [each.get("source") for each in more if isinstance(each, dict)]
    further = [SourcePart(source=source) for source in sources if isinstance(source, str)]
    return DataPart(train=train or "", eval=held_out, more=further).missing_files
