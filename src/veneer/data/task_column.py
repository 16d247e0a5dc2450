"""Column with the number of each row's task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer.errors import DataError

TASK = "task_ids"


def task_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Return the task of a row as a dict with its column name, or an empty dict if there is no such column.

    Raises DataError unless the task is an integer, or an integer as text, as in CSV files.
    """
    if TASK not in row:
        return {}
    task = row[TASK]
    if isinstance(task, str) and re.fullmatch("[0-9]{1,9}", task):
        task = int(task)
    if not isinstance(task, int) or isinstance(task, bool) or task < 0:
        raise DataError(
            f"column {TASK!r} must hold the number of a task, from 0 on, not {task!r:.60}: give each row the number of "
            "its task, or leave the column out"
        )
    return {TASK: task}
