"""Rows for preference tuning: pairs of a better and a worse answer, labelled answers, prompts to answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.data.column_templates import fields_of, fill_template
from veneer.data.files import raise_all
from veneer.data.tasks import OF_REWARDS
from veneer.errors import DataError

Task = Literal["dpo", "kto", "reward", "grpo", "rloo", "best_of"]

FORMS: Mapping[str, str] = {
    "dpo": "prompt, chosen and rejected (or chosen and rejected that begin with the same prompt)",
    "kto": "prompt, completion and label (true or false), or prompt, chosen and rejected",
    "reward": "chosen and rejected, with or without prompt",
    **dict.fromkeys(OF_REWARDS, "prompt, and whatever columns the reward functions read"),
}
_COLUMNS: Mapping[str, tuple[frozenset[str], ...]] = {
    "dpo": (frozenset({"chosen", "rejected"}),),
    "kto": (frozenset({"prompt", "completion", "label"}), frozenset({"chosen", "rejected"})),
    "reward": (frozenset({"chosen", "rejected"}),),
    **dict.fromkeys(OF_REWARDS, (frozenset({"prompt"}),)),
}
_BESIDE = ("tools", "chat_template_kwargs", "margin", "ref_chosen_logps", "ref_rejected_logps")  # TRL's
_READ = ("prompt", "chosen", "rejected", "completion", "label")


def checked_rows(rows: Any, name: str, task: Task) -> Any:
    """Check rows, and return them unchanged. Several data sets, given as a mapping, are checked one by one.

    Raises DataError if columns are missing. If none are, but rows cannot be used, raises DataError with the number and
    the problem of each such row: a value is empty or malformed, or chosen and rejected are equal. Streamed rows are
    checked later, as they are read.
    """
    if rows is None:
        if name == "train":
            raise DataError(f"train_dataset is missing: {task} trains on rows with {FORMS[task]}")
        return None
    if isinstance(rows, Mapping):
        return {key: checked_rows(part, str(key), task) for key, part in rows.items()}
    # Here, as it imports pandas: rows are looked at without it.
    from datasets import Dataset, IterableDataset

    if not isinstance(rows, Dataset | IterableDataset):
        raise DataError(f"the {name} data must be a datasets.Dataset, not {type(rows).__name__}")
    if isinstance(rows, Dataset):
        if not len(rows):
            raise DataError(f"the {name} data has no rows: give at least one")
        require_columns(rows.column_names, name, task)
        problems = [f"row {n}: {told}" for n, row in enumerate(rows, start=1) if (told := row_problem(row, task))]
        raise_all(f"the {name} data", problems)
    return rows


def require_columns(columns: list[str], name: str, task: Task) -> None:
    """Raise DataError if these are not a task's columns."""
    if any(needed <= set(columns) for needed in _COLUMNS[task]) or "prompt_ids" in columns or "chosen_ids" in columns:
        return
    missing = sorted(_COLUMNS[task][0] - set(columns))
    raise DataError(
        f"the {name} data has the columns {sorted(columns)} and lacks {' and '.join(missing)}: {task} trains on rows "
        f"with {FORMS[task]}. Rename the columns, or choose the task that these rows are for"
        + _other_task(set(columns), task)
    )


def row_problem(row: Mapping[str, Any], task: Task) -> str | None:
    """Return why a row cannot be used, or None if it can."""
    for column in ("prompt", "chosen", "rejected", "completion"):
        if column in row and (told := _value_problem(column, row[column], row)):
            return told
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return f"chosen and rejected are the same, so that nothing is preferred: {row['chosen']!r:.60}"
    if task == "kto" and "label" in row and row["label"] not in (0, 1):
        return f"label must be true or false, not {row['label']!r:.40}"
    return None


def _value_problem(column: str, value: Any, row: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str | list):
        found = "missing" if value is None else type(value).__name__
        return f"{column} must be a string or a list of messages, not {found}"
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
        other
        for other, forms in _COLUMNS.items()
        if other not in (task, *OF_REWARDS[1:]) and any(f <= columns for f in forms)
    ]
    if {"messages"} & columns or {"prompt", "completion"} <= columns:
        fits = [other for other in fits if other != "grpo"] + ["sft"]
    return f" ({', '.join(fits)})" if fits else ""


@dataclass(frozen=True, kw_only=True)
class PreferenceReader:
    """Reader of a source's rows for preference tasks, for use with `load_rows`.

    ``prompt`` is a template such as ``"Question: {question}"`` over the columns, which are kept. ``chat`` turns texts
    into user and assistant turns. ``system`` is a message added before each conversation.
    """

    task: Task
    prompt: str | None = None
    chat: bool = False
    system: str | None = None

    def form(self, columns: Iterable[str]) -> str:
        """Return the name of the form. Raises DataError if the columns are not those of the task."""
        require_columns([*columns, *(["prompt"] if self.prompt else [])], "rows'", self.task)
        return self.task

    def unread(self, columns: Iterable[str], form: str) -> list[str]:
        """Return the columns that nothing reads. A task with reward functions reads all columns."""
        if form in OF_REWARDS:
            return []
        read = {*_READ, *_BESIDE, *fields_of(self.prompt or "")}
        return [name for name in columns if name not in read and not name.endswith("_ids")]

    def read(self, row: Mapping[str, Any], form: str) -> dict[str, Any]:
        """Return one row with its task's columns. Raises DataError for an unusable one."""
        read = dict(row)
        if self.prompt is not None:
            read["prompt"] = fill_template(self.prompt, row)
        problem = row_problem(read, self.task)
        if problem:
            raise DataError(problem)
        if isinstance(read.get("label"), int):
            read["label"] = bool(read["label"])
        if self.chat:
            read |= {key: _turns(key, read[key]) for key in _READ[:4] if isinstance(read.get(key), str)}
        return self._with_system(read)

    def _with_system(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.system is None:
            return row
        first = [key for key in (("prompt",) if "prompt" in row else ("chosen", "rejected")) if key in row]
        if not all(isinstance(row[key], list) for key in first):
            raise DataError("data.system is for conversations, and the row is text: set data.chat, or leave it out")
        message = {"role": "system", "content": self.system}
        return {**row, **{key: [message, *row[key]] for key in first if row[key][0]["role"] != "system"}}


def _turns(column: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if column == "prompt" else "assistant", "content": text}]
