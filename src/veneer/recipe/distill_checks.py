"""Finds the problems of a recipe's distillation that its values and the teacher's prompt reveal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.recipe.adapter import FULL, method_of
from veneer.recipe.tasks import task_of
from veneer.recipe.values import section

BASE = "base"  # the teacher that is the student's model with its adapter off
_SHARES = ("beta", "lmbda")  # of 1


def distill_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of ``distill``, and of the task's settings, that their types do not reveal."""
    task, given = task_of(values), section(values, "distill")
    if task != "distill":
        return [f"distill: belongs to task distill, and the task here is {task}; drop it"] if given else []
    found = []
    if "distill" not in values:
        found.append("distill: is missing; say what the teacher reads: {teacher_prompt: FILE}")
    elif given.get("teacher", BASE) == BASE and given.get("teacher_prompt") is None:
        found.append("distill.teacher_prompt: is missing, so the teacher would be the student; give it, or a teacher")
    if method_of(section(values, "adapter")) == FULL:
        found.append("adapter.method: full has no adapter, which distillation trains; use a method such as lora")
    for key in _SHARES:
        value = section(values, "training").get(key)
        if isinstance(value, int | float) and not 0 <= value <= 1:
            found.append(f"training.{key}: {value} must be between 0 and 1")
    if isinstance(given.get("teacher_prompt"), str):
        try:
            teacher_prompt(given["teacher_prompt"])
        except ConfigError as error:
            found.append(str(error))
    return found


def teacher_prompt(file: str) -> str:
    """Return the text of the teacher's prompt. Raises ConfigError for a file that is missing, empty, or not text."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        told = f"{file} cannot be read ({error.strerror}): give a file of text"
    except UnicodeDecodeError as error:
        told = f"{file} is not text in UTF-8 ({error}): save it as UTF-8"
    else:
        if text.strip():
            return text
        told = f"{file} is empty, so the teacher would be the student: write what it is to read"
    raise ConfigError(f"distill.teacher_prompt: {told}")
