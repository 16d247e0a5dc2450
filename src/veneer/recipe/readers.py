"""Readers of a recipe's rows, and a look at the first row of each file before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from veneer.data.named_files import names_a_file
from veneer.data.preference import PreferenceReader
from veneer.data.reader import RowReader, require_readable
from veneer.errors import ConfigError
from veneer.recipe.parts import DataPart
from veneer.recipe.sweep_part import PART, members_of
from veneer.recipe.tasks import OF_ANSWERS, Task, task_of
from veneer.recipe.values import section


def readers_of(part: DataPart) -> list[RowReader]:
    """Return the reader of ``data.train``, and that of each source of ``data.more``."""
    found = [RowReader(prompt=part.prompt, completion=part.completion, chat=part.chat, system=part.system)]
    for each in part.more:
        templates = (part.prompt, part.completion) if each.prompt is None else (each.prompt, each.completion)
        found.append(
            RowReader(
                prompt=templates[0],
                completion=templates[1],
                chat=part.chat if each.chat is None else each.chat,
                system=part.system if each.system is None else each.system,
            )
        )
    return found


def preference_reader(part: DataPart, task: Task) -> PreferenceReader:
    """Return the reader of rows for tasks whose rows hold several answers (preferences, reward models) or none
    (learning from generated answers).
    """
    return PreferenceReader(task=cast(Any, task), prompt=part.prompt, chat=part.chat, system=part.system)


def refuse_rows(values: Mapping[str, Any], path: Path) -> None:
    """Check the first row of each data file in a recipe's values, or of each member of a sweep. The values must have
    passed `refuse_early`.

    Raises the errors of `require_first_rows`.
    """
    runs = [each.values for each in members_of(values, path)[0]] if PART in values else [values]
    parts = {str(section(run, "data")): (DataPart(**section(run, "data")), task_of(run)) for run in runs}
    for part, task in parts.values():
        require_first_rows(part, task)


def require_first_rows(part: DataPart, task: Task = "sft") -> None:
    """Check the first row of each data file. Raises DataError for files that are empty or whose first row is unusable.

    Raises ConfigError for a template that does not fit the columns. Data sets of the hub are not checked.
    """
    own, *more = readers_of(part)
    readers: list[RowReader | PreferenceReader] = (
        [own, *more] if task in OF_ANSWERS else [preference_reader(part, task)]
    )
    named = [part.train, *(each.source for each in part.more)]
    files = [(name, reader, part.limit) for name, reader in zip(named, readers, strict=False)]
    files += [] if part.eval is None else [(part.eval, readers[0], part.eval_limit)]
    for name, reader, limit in files:
        form = require_readable(Path(name), reader, limit) if names_a_file(name) else ""
        if form == "text" and task == "sft" and not part.more:
            require_no_answers(part)


def require_no_answers(part: DataPart) -> None:
    """Raise ConfigError if ``train_on: answers`` is given for rows of plain text."""
    if part.train_on == "answers" and "train_on" in part.model_fields_set:
        raise ConfigError(
            "data.train_on: answers, and the rows are plain text, in which nothing tells answers apart: set it to "
            "everything, or give rows with messages, or with prompt and completion (data.prompt and data.completion "
            "make them of other columns)"
        )
