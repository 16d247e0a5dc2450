"""Part ``metric`` of a recipe: the task's own measure on held-out rows, computed at every evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer.recipe.tasks import OF_ANSWERS


class MetricPart(BaseModel):
    """Metric by its name in `veneer eval`, over the first ``limit`` held-out rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["exact-match", "labels", "regex"] = Field(description="as in `veneer eval`")
    pattern: str | None = Field(default=None, description="for regex: the part of an answer that is compared")
    labels: list[str] = Field(
        default=[], description="for labels: the words to choose from, by default all answers in the data"
    )
    ignore_case: bool = Field(default=False, description="ignore case and white space in comparisons")
    limit: int = Field(default=200, ge=1, description="at most this many held-out rows are used")
    max_new_tokens: int = Field(default=64, ge=1, description="most tokens of an answer")
    batch_size: int = Field(default=16, ge=1, description="most rows in one forward pass")

    @property
    def key(self) -> str:
        """Name of the metric in the log, without the prefix ``eval_``."""
        return self.name.replace("-", "_")


def metric_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of ``metric`` that its schema does not find."""
    metric, data = values.get("metric"), values.get("data")
    if not isinstance(metric, dict):
        return []
    task = values.get("task", "sft")
    if task not in OF_ANSWERS:
        return [f"metric: is measured with task {', '.join(OF_ANSWERS)}, and this is {task}; drop it"]
    name, pattern, found = metric.get("name"), metric.get("pattern"), list[str]()
    if name == "regex" and pattern is None:
        found.append("metric.pattern: is missing; regex compares what it matches in answers")
    if name != "regex" and pattern is not None:
        found.append(f"metric.pattern: is read by regex alone, and metric.name is {name}; drop it")
    if name != "labels" and metric.get("labels"):
        found.append(f"metric.labels: is read by labels alone, and metric.name is {name}; drop it")
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"metric.pattern: {pattern!r} is not a regular expression ({error}): correct it")
    if isinstance(data, dict) and data.get("eval") is None and not data.get("eval_fraction"):
        found.append("metric: is measured on held-out rows, and there are none: give data.eval or data.eval_fraction")
    return found
