"""Rows of preferences: pairs of a better and a worse answer, answers with a label, prompts to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from veneer.data.files import raise_all
from veneer.errors import DataError

Task = Literal["dpo", "kto", "reward", "grpo", "rloo"]

FORMS: Mapping[str, str] = {
    "dpo": "prompt, chosen and rejected (or chosen and rejected that begin with the same prompt)",
    "kto": "prompt, completion and label (true or false), or prompt, chosen and rejected",
    "reward": "chosen and rejected, with or without prompt",
    "grpo": "prompt, and whatever columns the reward functions read",
    "rloo": "prompt, and whatever columns the reward functions read",
}
_COLUMNS: Mapping[str, tuple[frozenset[str], ...]] = {
    "dpo": (frozenset({"chosen", "rejected"}),),
    "kto": (frozenset({"prompt", "completion", "label"}), frozenset({"chosen", "rejected"})),
    "reward": (frozenset({"chosen", "rejected"}),),
    "grpo": (frozenset({"prompt"}),),
    "rloo": (frozenset({"prompt"}),),
}
_READ = ("prompt", "chosen", "rejected", "completion", "label")


def checked_rows(rows: Any, name: str, task: Task) -> Any:
    """The rows as they are; those of several data sets each.

    Raises DataError where columns are missing, and, with all of them by number, for rows that hold nothing, or the
    same answer twice. Streamed rows are looked at one by one later on, so that only their columns are known.
    """
    if rows is None:
        if name == "train":
            raise DataError(f"train_dataset is missing: {task} trains on rows with {FORMS[task]}")
        return None
    if isinstance(rows, Mapping):
        return {key: checked_rows(part, str(key), task) for key, part in rows.items()}
    if not isinstance(rows, Dataset | IterableDataset):
        raise DataError(f"the {name} data must be a datasets.Dataset, not {type(rows).__name__}")
    if isinstance(rows, Dataset):
        if not len(rows):
            raise DataError(f"the {name} data has no rows")
        require_columns(rows.column_names, name, task)
        problems = [f"row {n}: {told}" for n, row in enumerate(rows, start=1) if (told := row_problem(row, task))]
        raise_all(f"the {name} data", problems)
    return rows


def require_columns(columns: list[str], name: str, task: Task) -> None:
    """Raise DataError where these are not the columns of a task."""
    if any(needed <= set(columns) for needed in _COLUMNS[task]) or "prompt_ids" in columns or "chosen_ids" in columns:
        return
    missing = sorted(_COLUMNS[task][0] - set(columns))
    raise DataError(
        f"the {name} data has the columns {sorted(columns)} and lacks {' and '.join(missing)}: {task} trains on rows "
        f"with {FORMS[task]}. Rename the columns, or choose the task that these rows are for"
        + _other_task(set(columns), task)
    )


def row_problem(row: Mapping[str, Any], task: Task) -> str | None:
    """In words what makes a row useless, if anything."""
    for column in ("prompt", "chosen", "rejected", "completion"):
        if column in row and (told := _value_problem(column, row[column], row)):
            return told
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return f"chosen and rejected are the same, so that nothing is preferred: {row['chosen']!r:.60}"
    if task == "kto" and "label" in row and not isinstance(row["label"], bool):
        return f"label must be true or false, not {row['label']!r:.40}"
    return None


def _value_problem(column: str, value: Any, row: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str | list):
        return f"{column} must be a string or a list of messages, not {'missing' if value is None else type(value).__name__}"
    if not value and column != "prompt":
        return f"{column} is empty"
    if not value and column == "prompt" and "chosen" not in row:
        return f"{column} is empty"
    if isinstance(value, list):
        for turn in value:
            if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
                return f"{column}: a message must be an object with role and content, not {turn!r:.60}"
    kinds = {type(row[c]) for c in _READ[:4] if isinstance(row.get(c), str | list)}
    return "some of its columns are text and others messages: give all in one form" if len(kinds) > 1 else None


def _other_task(columns: set[str], task: Task) -> str:
    fits = [
        other for other, forms in _COLUMNS.items() if other not in (task, "rloo") and any(f <= columns for f in forms)
    ]
    if {"messages"} & columns or {"prompt", "completion"} <= columns:
        fits = [other for other in fits if other != "grpo"] + ["sft"]
    return f" ({', '.join(fits)})" if fits else ""
