"""Further sources of training rows in a recipe, each with a weight and a reading of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class SourcePart(BaseModel):
    """Source of rows in addition to ``data.train``. Reading settings that it does not give are those of ``data``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="as `data.train`")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="how often each row is taken")
    count: int | None = Field(default=None, ge=1, description="the number of rows to take, instead of a weight")
    prompt: str | None = Field(default=None, description="as `data.prompt`; only together with completion")
    completion: str | None = Field(default=None, description="as `data.completion`")
    chat: bool | None = Field(default=None, description="as `data.chat`, and by default its value")
    system: str | None = Field(default=None, description="as `data.system`, and by default its value")


_OF_SFT = ("more", "streaming")


def streaming_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of settings that streamed rows cannot have."""
    data, training = _dict(values, "data"), _dict(values, "training")
    if data.get("streaming") is not True:
        return []
    beside = {
        "data.more": data.get("more"),
        "data.limit": data.get("limit"),
        "data.eval_fraction": data.get("eval_fraction"),
        "training.packing": training.get("packing"),
    }
    found = [
        f"{key}: needs all rows, which data.streaming never has; drop one of the two" for key in beside if beside[key]
    ]
    if not isinstance(training.get("max_steps"), int) or training["max_steps"] < 1:
        found.append("training.max_steps: is missing; the number of rows that are streamed is not known beforehand")
    return found


def _dict(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def source_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of ``data.more`` that its schema does not find."""
    data, task = values.get("data"), values.get("task", "sft")
    if not isinstance(data, dict):
        return []
    found, more = list[str](), data.get("more")
    if task != "sft":
        found += [f"data.{key}: is for task sft, and this is {task}; drop it" for key in _OF_SFT if data.get(key)]
    for number, each in enumerate(more if isinstance(more, list) else [], start=1):
        if not isinstance(each, dict):
            continue
        if (each.get("prompt") is None) != (each.get("completion") is None):
            found.append(f"data.more, entry {number}: prompt and completion belong together; give both or neither")
        if each.get("weight") is not None and each.get("count") is not None:
            found.append(f"data.more, entry {number}: give weight or count, not both")
    return found
