"""Metrics by name: their questions about rows, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from veneer.data.asked_rows import as_templated
from veneer.data.windows import Windows
from veneer.errors import ConfigError
from veneer.evaluate.accuracy import (
    Accuracy,
    Judge,
    ScoredChoice,
    answer_accuracy,
    exact_match,
    regex_match,
    require_few,
)
from veneer.evaluate.perplexity import Texts
from veneer.evaluate.questions import Question, QuestionReader
from veneer.evaluate.scoring import Answering

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Questions with free-form answers, and the judge of the answers."""

    questions: Sequence[Question]
    answering: Answering
    judge: Judge

    def judged(self, answers: Sequence[str]) -> Accuracy:
        """Return the accuracy of answers, one to each question."""
        return answer_accuracy(self.questions, answers, self.judge)


@dataclass(frozen=True, slots=True)
class Passages:
    """Rows whose tokens are scored, in windows that depend on the model's context."""

    tokenizer: Any
    rows: Rows
    metric: TokenPerplexity

    def within(self, limit: int | None) -> Texts:
        """Return the rows cut into windows for a context of ``limit`` tokens. Raises the errors of `Texts.of`."""
        windows = Windows.within(limit, self.metric.context, self.metric.stride)
        return Texts.of(self.tokenizer, self.rows, windows, whole_rows=self.metric.whole_rows)


Asked = Answers | ScoredChoice | Passages


class Metric(Protocol):
    """Metric of a model over rows. Its fields are its settings."""

    name: ClassVar[str]

    def ask(self, reader: QuestionReader, rows: Rows, whole: Rows = ()) -> Asked:
        """Return the questions about the rows, without a model. ``whole``: all rows of the data, if ``rows`` are only
        the first of them.

        Raises DataError that names the row, and ConfigError.
        """


@dataclass(frozen=True, kw_only=True)
class TokenPerplexity:
    """Perplexity of answers, or of texts, in windows of ``context`` tokens, ``stride`` tokens apart.

    ``whole_rows``: tokens of prompts are scored too, not only those of answers. Defaults: see `Windows.within`.
    """

    name: ClassVar[str] = "perplexity"

    context: int | None = None
    stride: int | None = None
    whole_rows: bool = False

    def __post_init__(self) -> None:
        Windows.within(None, self.context, self.stride)

    def ask(self, reader: QuestionReader, rows: Rows, whole: Rows = ()) -> Passages:
        if reader.prompt is None and reader.answer_field is not None:
            raise ConfigError("answer_field is given without prompt: perplexity reads both. Give a prompt template too")
        read = rows if reader.prompt is None else as_templated(rows, reader.prompt, reader.answer_field)
        return Passages(reader.tokenizer, read, self)


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Accuracy of generated answers, compared whole. ``ignore_case``: ignore case and white space.

    Answers are greedy and end after ``max_new_tokens``, or before one of the ``stop`` texts.
    """

    name: ClassVar[str] = "exact-match"

    ignore_case: bool = False
    max_new_tokens: int = Answering.max_new_tokens
    stop: tuple[str, ...] = ()

    @property
    def judge(self) -> Judge:
        """Judge of answers."""
        return exact_match(fold=self.ignore_case)

    def ask(self, reader: QuestionReader, rows: Rows, whole: Rows = ()) -> Answers:
        stop = tuple(text for text in self.stop if text)
        return Answers(reader.read(rows), Answering(max_new_tokens=self.max_new_tokens, stop=stop), self.judge)


@dataclass(frozen=True, kw_only=True)
class RegexMatch(ExactMatch):
    """`ExactMatch` of the last match of ``pattern`` (its group 1, if it has one). Raises ConfigError for an
    invalid one.
    """

    name: ClassVar[str] = "regex"

    pattern: str

    def __post_init__(self) -> None:
        _ = self.judge

    @property
    def judge(self) -> Judge:
        return regex_match(self.pattern, fold=self.ignore_case)


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """Accuracy of the likeliest label. ``labels``: the words to choose from; by default the answers of all rows."""

    name: ClassVar[str] = "labels"

    labels: tuple[str, ...] = ()

    def ask(self, reader: QuestionReader, rows: Rows, whole: Rows = ()) -> ScoredChoice:
        questions, words = reader.read(rows), self.labels
        if not words:
            words = tuple(reader.all_answers(whole or rows))
            require_few(words)
        return ScoredChoice.of(reader.tokenizer, questions, words)


METRICS: Mapping[str, type[Any]] = MappingProxyType(
    {metric.name: metric for metric in (TokenPerplexity, ExactMatch, RegexMatch, LabelChoice)}
)


def metric_named(name: str) -> Metric:
    """Return a metric with its default settings. Raises ConfigError for an unknown name, and for ``regex``."""
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} is unknown: give one of {', '.join(METRICS)}, or a metric object")
    if name == RegexMatch.name:
        raise ConfigError("metric 'regex' needs a pattern: give RegexMatch(pattern=…)")
    metric: Metric = METRICS[name]()
    return metric
