"""Results of a recipe's run: its saved model or adapter, its rows and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from veneer.adapters.chosen import ModelParts, tokenizer_with
from veneer.errors import ConfigError, FormatError
from veneer.model.memory.default_device import default_device
from veneer.recipe.parts import DataPart, ModelPart
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.recipe.sweep_part import PART
from veneer.recipe.values import read_values
from veneer.store.bars import quiet
from veneer.store.source import load_model, load_tokenizer
from veneer.train.base_model import load_base
from veneer.train.record.record import RUN_FILE, record_of, require_recipe
from veneer.train.rows import read_data


def trained_recipe(path: Path) -> Recipe:
    """Return the recipe in a file, or that of the run in a folder, with the changes by ``--set`` that the run had.

    Raises ConfigError if it is invalid or describes several runs, and FormatError for a damaged record.
    """
    if path.is_dir():
        return _recipe_of_run(path)
    values = read_values(path)
    if PART in values:
        raise ConfigError(
            f"{path} is a recipe of several runs: measure one of them by its adapter, "
            f"`veneer eval {values.get('output')}/NAME/adapter --data FILE`"
        )
    return parse_recipe(values, str(path))


def _recipe_of_run(folder: Path) -> Recipe:
    """Return the recipe of a run's folder, even if the folder was moved."""
    require_recipe(folder)
    record = record_of(folder) or {}
    try:
        return Recipe.model_validate({**record["recipe"], "output": str(folder)})
    except (ValidationError, TypeError) as error:
        raise FormatError(f"{folder / RUN_FILE} holds no recipe that can be read: give the recipe's file") from error


def saved_by(output: Path, method: str) -> Path:
    """Return the folder of the adapter, or of the whole model, that a run saved. Raises ConfigError if
    there is none.
    """
    saved = output / ("model" if method == "full" else "adapter")
    if not saved.is_dir():
        raise ConfigError(
            f"the recipe's run has saved nothing yet: there is no folder {saved}; `veneer train` makes it. "
            "Of a run with --set output=FOLDER, give that folder"
        )
    return saved


def held_out_rows(
    part: DataPart, seed: int, data: Path | None
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Return two sets of rows in the recipe's form: those to measure on, and the training rows.

    The first are the rows of the file ``data``; without it, the recipe's held-out rows. Raises ConfigError if there are
    neither.
    """
    if data is not None:
        part = part.model_copy(update={"eval": str(data), "eval_fraction": 0.0, "eval_limit": None})
    rows = read_data(part, seed)
    if rows.eval is None:
        raise ConfigError("the recipe names no held-out rows (data.eval or data.eval_fraction): give --data FILE")
    return [dict(row) for row in rows.eval], [dict(row) for row in ([] if part.streaming else rows.train)]


def trained_tokenizer(source: str, saved: Path) -> Any:
    """Return the tokenizer that a run used, from its base ``source`` and the files that it saved.

    Raises the errors of `load_tokenizer`.
    """
    with quiet():
        return tokenizer_with(load_tokenizer(source), [saved])


def trained_parts(part: ModelPart, method: str, saved: Path, tokenizer: Any) -> ModelParts:
    """Return the parts for loading the trained model: the base, stored as the recipe says, with the adapter; or the
    model that was trained whole.
    """
    device = default_device()
    with quiet():
        if method == "full":
            base = load_model(str(saved), dtype=part.dtype, device=device)
            return ModelParts(base=base, tokenizer=tokenizer, source=str(saved))
        base = load_base(part, device=device)
        return ModelParts(base=base, tokenizer=tokenizer, source=part.source, adapters=(saved,))
