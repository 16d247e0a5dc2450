"""Resumed run: the settings and data that have changed since it began, and the check that they may."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.source import adapter_folder
from veneer.errors import ConfigError
from veneer.recipe.adapter import FROM
from veneer.recipe.changes import ChangedSetting, changes, is_longer, refuse
from veneer.recipe.distributed_part import DistributedPart
from veneer.recipe.parts import DataPart
from veneer.recipe.recipe import Recipe
from veneer.train.processes import n_processes
from veneer.train.record.record import RUN_FILE

PROCESSES = "processes"


@dataclass(frozen=True, slots=True)
class GoingOn:
    """A resumed run: its record ``before``, the settings that have changed since, and the permission to change them."""

    before: Mapping[str, Any] | None = None
    changes: Sequence[ChangedSetting] = ()
    allow_changes: bool = False

    def recorded(self, step: int) -> list[dict[str, Any]]:
        """Return all changes of the run, earlier and new ones. The new ones are marked with ``step``, after which it
        resumes.
        """
        earlier = list((self.before or {}).get("changes", []))
        return [*earlier, *({"step": step, **asdict(each)} for each in self.changes)]


def changes_since(before: Mapping[str, Any], recipe: Recipe, allow: bool) -> list[ChangedSetting]:
    """Return the settings of a recipe that differ from a record's.

    Raises ConfigError with all of them if there are any and ``allow`` is False.
    """
    path = Path(recipe.output) / RUN_FILE
    try:
        found = changes(Recipe.model_validate(before["recipe"]), recipe, before.get("places"))
    except ValueError as error:  # of pydantic, or a ConfigError
        raise ConfigError(
            f"the recipe in {path} cannot be read by this version, so changes since then are unknown ({error}). Start "
            "a new run in another output (--set output=…)."
        ) from error
    count, batches = before.get("n_processes", 1), _global_batches(before, recipe.distributed)
    if count != n_processes():
        found.append(ChangedSetting(PROCESSES, count, n_processes()))
        if batches[0] not in (None, batches[1]):  # divided by another number, they may give the same accumulation
            found.append(ChangedSetting("distributed.global_batch", *batches))
    old, new = before.get("parent"), parent_of(recipe.adapter)
    if old is not None and new is not None and old["blake2b"] != new["blake2b"]:
        found.append(ChangedSetting("adapter.from", f"an adapter with the hash {old['blake2b']}", new["blake2b"]))
    same_rows = batches[0] == batches[1] and not tied_to_its_processes(recipe)  # of each step, by any processes
    refused = [each for each in found if each.key != PROCESSES or not same_rows]
    if not allow and refused:
        refuse([*refused, *_other_files(before, recipe.data)], Path(recipe.output))
    return found


def tied_to_its_processes(recipe: Recipe) -> list[str]:
    """Return the settings that make the rows of each step depend on the number of processes.

    These are: no global batch, streamed rows, rows dropped at the end of an epoch, and tasks other than supervised
    fine-tuning, whose last batches differ.
    """
    found = {
        "no distributed.global_batch": recipe.distributed.global_batch is None,
        "data.streaming": recipe.data.streaming,
        "training.dataloader_drop_last": recipe.training_config().dataloader_drop_last,
        f"task: {recipe.task}": recipe.task != "sft",
    }
    return [setting for setting, is_set in found.items() if is_set]


def _global_batches(before: Mapping[str, Any], now: DistributedPart) -> tuple[int | None, int | None]:
    return Recipe.model_validate(before["recipe"]).distributed.global_batch, now.global_batch


def parent_of(adapter: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the saved adapter that a run continues to train: its name in the recipe, and a hash of its values. Return
    None if the adapter is fresh.
    """
    if FROM not in adapter:
        return None
    folder = adapter_folder(adapter[FROM])
    return {"from": str(adapter[FROM]), "blake2b": _hash_of(folder / WEIGHTS_FILE)}


def is_complete(before: Mapping[str, Any], recipe: Recipe) -> bool:
    """Return True if the run is finished and the recipe asks for no more steps."""
    return before["status"] == "finished" and not is_longer(Recipe.model_validate(before["recipe"]), recipe)


def with_data(going_on: GoingOn, record: Mapping[str, Any]) -> GoingOn:
    """Return ``going_on`` with changed data sets added to its changes.

    Raises ConfigError that names them if changes are not allowed.
    """
    old, new = (going_on.before or {}).get("data"), record["data"]
    if old is None:
        return going_on
    found = [
        ChangedSetting(f"data.{part}", _told_rows(old[part]), _told_rows(new[part]))
        for part in ("train", "eval")
        if (old[part] or {}).get("blake2b") != (new[part] or {}).get("blake2b")
    ]
    if not going_on.allow_changes:
        refuse(found, Path(record["recipe"]["output"]))
    return replace(going_on, changes=[*going_on.changes, *found])


def _told_rows(rows: Mapping[str, Any] | None) -> str:
    if rows is not None and rows.get("streamed"):
        return "rows that are streamed"
    return "no rows" if rows is None else f"{rows['rows']:,} rows with the hash {rows['blake2b']}"


def _other_files(before: Mapping[str, Any], data: DataPart) -> list[ChangedSetting]:
    """Return the data files whose content has changed, as changes of settings."""
    old, new = before.get("files", {}), files_of(data)
    return [ChangedSetting(key, old[key], new[key]) for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]


def files_of(part: DataPart) -> dict[str, str]:
    """Return a hash of the content for each source of rows that is a file."""
    found = {key: Path(name) for key, name in part.sources.items() if Path(name).is_file()}
    return {key: f"a file with the hash {_hash_of(path)}" for key, path in found.items()}


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
