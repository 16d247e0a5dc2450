"""Metric of a task on held-out rows during training: the share of right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError
from veneer.evaluate.measurement import measure_each
from veneer.evaluate.metric import Asked, ExactMatch, LabelChoice, Metric, RegexMatch
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import Batching
from veneer.recipe.metric_part import MetricPart

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TaskMetric:
    """Metric of a recipe, with its questions, which are read only once for all evaluations."""

    part: MetricPart
    tokenizer: Any
    asked: Asked

    @classmethod
    def of(cls, part: MetricPart, tokenizer: Any, held_out: Sequence[Row], train: Sequence[Row]) -> TaskMetric:
        """Return the metric for the first held-out rows. If no labels are given, all rows' answers are the labels.

        Raises DataError if rows hold no answer to compare with.
        """
        reader, rows = QuestionReader(tokenizer=tokenizer), list(held_out)
        whole = [*rows, *train] if part.name == LabelChoice.name and not part.labels else ()
        try:
            return cls(part, tokenizer, _metric(part).ask(reader, rows[: part.limit], whole))
        except DataError as error:
            raise DataError(f"metric {part.name}: {error}") from error

    def value(self, model: Any) -> float:
        """Return the share of the questions that a model answers right."""
        batching = Batching(n_rows=self.part.batch_size)
        return measure_each(model, self.asked, tokenizer=self.tokenizer, batching=batching)[0].value


def _metric(part: MetricPart) -> Metric:
    if part.name == LabelChoice.name:
        return LabelChoice(labels=tuple(part.labels))
    how: dict[str, Any] = {"ignore_case": part.ignore_case, "max_new_tokens": part.max_new_tokens}
    return ExactMatch(**how) if part.pattern is None else RegexMatch(pattern=part.pattern, **how)
