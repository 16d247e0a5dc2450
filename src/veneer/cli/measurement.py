"""One measurement of ``veneer eval``: a model, the rows that it is asked about, and the metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Union

from veneer.cli import loading
from veneer.cli.arguments import require_file

if TYPE_CHECKING:
    from veneer.cli.answerer import Answerer
    from veneer.cli.loading import Loaded, Parts
    from veneer.cli.subject import Subject
    from veneer.evaluate.accuracy import Accuracy, Choice, Judge
    from veneer.evaluate.perplexity import Perplexity, Windows
    from veneer.evaluate.questions import Question
    from veneer.evaluate.scoring import Answering

OnProgress = Callable[[int, int], None]
Result = Union["Accuracy", "Perplexity"]


class Metric(StrEnum):
    """The metrics of ``veneer eval``."""

    PERPLEXITY = "perplexity"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    LABELS = "labels"


_OF_ANSWERS = (Metric.EXACT_MATCH, Metric.REGEX)  # generated; the others score what is given, in one pass
_READS = {  # which options each metric reads; any other that is given is an error
    Metric.PERPLEXITY: {"prompt", "answer_field", "context", "stride", "whole_rows"},
    Metric.EXACT_MATCH: {"prompt", "answer_field", "ignore_case", "max_new_tokens", "stop"},
    Metric.REGEX: {"prompt", "answer_field", "ignore_case", "max_new_tokens", "stop", "pattern"},
    Metric.LABELS: {"prompt", "answer_field", "labels"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that only some metrics read, None or False where not given."""

    pattern: str | None
    labels: str | None
    prompt: str | None
    answer_field: str | None
    ignore_case: bool
    max_new_tokens: int | None
    stop: list[str] | None
    context: int | None
    stride: int | None
    whole_rows: bool

    def given(self) -> set[str]:
        """The names of those that were given."""
        return {name for name, value in vars(self).items() if value is not None and value is not False}

    def windows(self, limit: int | None) -> Windows:
        """The windows that long texts are read in, where the model's context holds ``limit`` tokens."""
        from veneer.evaluate.perplexity import Windows

        return Windows.within(limit, self.context, self.stride)

    @property
    def words(self) -> Sequence[str]:
        """The labels to choose from: words with commas, or the lines of a file; none: those in the data."""
        if self.labels is None:
            return ()
        file = Path(self.labels)
        if file.is_file() or (file.suffix == ".txt" and "," not in self.labels):
            return _lines_of(file)
        return self.labels.split(",")

    @property
    def judge(self) -> Judge:
        """The judge of answers."""
        from veneer.evaluate.accuracy import exact_match, regex_match

        fold = self.ignore_case
        return exact_match(fold=fold) if self.pattern is None else regex_match(self.pattern, fold=fold)

    @property
    def answering(self) -> Answering:
        """The settings of generated answers."""
        from veneer.evaluate.scoring import Answering

        stop = tuple(text for text in self.stop or () if text)
        return Answering(max_new_tokens=self.max_new_tokens or Answering.max_new_tokens, stop=stop)


def _lines_of(file: Path) -> list[str]:
    from veneer.errors import ConfigError

    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--labels {file}: the file cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--labels {file} is not text in UTF-8: {error}") from error


class Measurement:
    """One measurement: its metric, its options, and what it asks about the rows of a subject."""

    def __init__(self, metric: Metric, options: Options, batch_size: int) -> None:
        self.metric, self.options, self.batch_size = metric, options, batch_size
        self.questions: list[Question] = []
        self._choice: Choice | None = None

    def check(self, predictions: Path | None) -> None:
        """Raise ConfigError for options that this metric does not read or lacks, and answers with no place to go."""
        from veneer.errors import ConfigError

        foreign = sorted(self.options.given() - _READS[self.metric])
        problems = [f"--{name.replace('_', '-')} is not read by --metric {self.metric}" for name in foreign]
        if self.metric is Metric.REGEX and self.options.pattern is None:
            problems.append("--metric regex needs --pattern")
        if self.metric is Metric.PERPLEXITY and predictions is not None:
            problems.append("--predictions is not read by --metric perplexity")
        if self.metric is Metric.PERPLEXITY and self.options.answer_field and self.options.prompt is None:
            problems.append("--metric perplexity reads --answer-field together with --prompt")
        if problems:
            raise ConfigError("; ".join(problems))
        if predictions is not None:
            require_file("--predictions", predictions)
        if self.metric is Metric.PERPLEXITY:
            self.options.windows(None)
        elif self.metric in _OF_ANSWERS:
            _ = self.options.judge
        else:
            _ = self.options.words

    def ask(self, subject: Subject) -> None:
        """Make the questions of the subject's rows, before a model is loaded. Raises DataError and ConfigError."""
        from veneer.evaluate.accuracy import Choice, require_few
        from veneer.evaluate.questions import QuestionReader, as_templated

        options, tokenizer = self.options, subject.tokenizer
        if self.metric is Metric.PERPLEXITY:
            if options.prompt is not None:
                subject.rows = as_templated(subject.rows, options.prompt, options.answer_field)
            return
        reader = QuestionReader(tokenizer=tokenizer, prompt=options.prompt, answer_field=options.answer_field)
        self.questions = reader.read(subject.rows)
        if self.metric is Metric.LABELS:
            words = options.words
            if not words:
                words = reader.all_answers(subject.whole)
                require_few(words)
            self._choice = Choice.of(tokenizer, self.questions, words)

    def measure(self, subject: Subject, parts: Parts, on_progress: OnProgress) -> list[Result]:
        """A result for each column of the subject: an adapter, or the base without one."""
        from veneer.cli.answering import answerer_of

        if self.metric in _OF_ANSWERS:
            return self._answered(subject, answerer_of(parts, n_rows=self.batch_size), on_progress)
        with loading.quiet():
            return self._scored(subject, parts.joined(), on_progress)

    def _answered(self, subject: Subject, answerer: Answerer, on_progress: OnProgress) -> list[Result]:
        from veneer.evaluate.accuracy import answer_accuracy

        n, columns = len(self.questions), subject.columns
        prompts = [question.prompt for question in self.questions] * len(columns)
        folders = [folder for folder in columns for _ in range(n)] if subject.adapters else []
        answers = answerer.answers(prompts, self.options.answering, on_progress, folders)
        judge = self.options.judge
        return [answer_accuracy(self.questions, answers[i * n : (i + 1) * n], judge) for i in range(len(columns))]

    def _scored(self, subject: Subject, loaded: Loaded, on_progress: OnProgress) -> list[Result]:
        from veneer.evaluate.perplexity import Texts
        from veneer.evaluate.scoring import Batching, context_length, log_probabilities_of_each
        from veneer.model.routing import BASE

        names = [BASE if folder is None else loaded.names[folder] for folder in subject.columns]
        if self._choice is not None:
            asked: Choice | Texts = self._choice
        else:
            windows = self.options.windows(context_length(loaded.model, names if loaded.names else ()))
            asked = Texts.of(loaded.tokenizer, subject.rows, windows, whole_rows=self.options.whole_rows)
        batching, each = Batching(n_rows=self.batch_size), names if loaded.names else [""]
        found = log_probabilities_of_each(loaded.model, asked.items, each, batching, on_progress)
        return [asked.judged(values) for values in found]
