"""A task's metric on held-out rows during training: the share of right answers of the model as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError
from veneer.evaluate.accuracy import Choice, answer_accuracy, exact_match, regex_match, require_few
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import Answering, Batching, greedy_answers, log_probabilities
from veneer.recipe.metric_part import MetricPart

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TaskMetric:
    """The questions of a metric, read once."""

    part: MetricPart
    tokenizer: Any
    reader: QuestionReader
    rows: Sequence[Row]
    labels: Sequence[str]

    @classmethod
    def of(cls, part: MetricPart, tokenizer: Any, held_out: Sequence[Row], train: Sequence[Row]) -> TaskMetric:
        """The metric over the first held-out rows; labels that nobody names are the answers of all rows.

        Raises DataError where rows hold no answer to compare with.
        """
        reader, labels = QuestionReader(tokenizer=tokenizer), list(part.labels)
        try:
            if part.name == "labels" and not labels:
                labels = reader.all_answers([*held_out, *train])
                require_few(labels)
            metric = cls(part, tokenizer, reader, list(held_out)[: part.limit], labels)
            metric._questions()
        except DataError as error:
            raise DataError(f"metric {part.name}: {error}") from error
        return metric

    def _questions(self) -> Any:
        questions = self.reader.read(self.rows)
        return Choice.of(self.tokenizer, questions, self.labels) if self.part.name == "labels" else questions

    def value(self, model: Any) -> float:
        """The share of right answers."""
        part, asked, batching = self.part, self._questions(), Batching(n_rows=self.part.batch_size)
        if isinstance(asked, Choice):
            return asked.judged(log_probabilities(model, asked.items, batching)).value
        judge = (
            exact_match(fold=part.ignore_case)
            if part.pattern is None
            else regex_match(part.pattern, fold=part.ignore_case)
        )
        prompts, answering = [question.prompt for question in asked], Answering(max_new_tokens=part.max_new_tokens)
        answers = greedy_answers(model, self.tokenizer, prompts, answering, batching)
        return answer_accuracy(asked, answers, judge).value
