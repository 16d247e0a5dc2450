"""One measurement of ``veneer eval``: a model, the rows that it is asked about, and the metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli import loading
from veneer.cli.arguments import require_file

if TYPE_CHECKING:
    from veneer.cli.answerer import Answerer
    from veneer.evaluate.accuracy import Accuracy, Judge
    from veneer.evaluate.perplexity import Perplexity, Windows
    from veneer.evaluate.questions import Question
    from veneer.evaluate.scoring import Answering

OnProgress = Callable[[int, int], None]


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
        """The labels to choose from; none: those in the data."""
        return () if self.labels is None else self.labels.split(",")

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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured and the rows that it is measured on; None and False where not given."""

    model: str | None
    adapter: Path | None
    recipe: Path | None
    data: Path | None
    limit: int | None
    chat: bool
    system: str | None
    load_in_4bit: bool
    dtype: str


class Measurement:
    """One measurement: its rows, its options, its questions."""

    def __init__(self, metric: Metric, options: Options, batch_size: int) -> None:
        self.metric, self.options, self.batch_size = metric, options, batch_size
        self.rows: Sequence[Mapping[str, Any]] = ()
        self.questions: list[Question] = []

    def take(self, subject: Subject) -> tuple[loading.Loaded | Answerer, dict[str, Any]]:
        """Read the rows, then load the model, as the metric needs it; the facts known of both come with it."""
        from veneer.cli.answering import answerer_of

        recipe = subject.recipe
        parts, facts = self._take_model(subject) if recipe is None else self._take_recipe(subject, recipe)
        if self.metric in _OF_ANSWERS:
            return answerer_of(parts, n_rows=self.batch_size), facts
        with loading.quiet():
            return parts.joined(), facts

    def _take_model(self, subject: Subject) -> tuple[loading.Parts, dict[str, Any]]:
        from veneer.errors import ConfigError
        from veneer.evaluate.questions import read_rows

        model, adapter, data = subject.model, subject.adapter, subject.data
        if model is None or data is None:
            raise ConfigError("say what to measure: MODEL and --data FILE, or --recipe FILE for what a recipe trained")
        self.rows = read_rows(data)[: subject.limit]
        self._read_as_trained(subject.chat, subject.system)
        parts = loading.load_parts(model, adapter, four_bit=subject.load_in_4bit, dtype=subject.dtype)
        return parts, {"model": model, "adapter": None if adapter is None else str(adapter), "data": str(data)}

    def _take_recipe(self, subject: Subject, path: Path) -> tuple[loading.Parts, dict[str, Any]]:
        from veneer.cli.eval_recipe import held_out_rows, saved_by, trained_parts, trained_recipe
        from veneer.errors import ConfigError

        beside = self._said_by_recipes(subject)
        if beside:
            raise ConfigError(f"--recipe says it already, so leave out {', '.join(beside)}")
        recipe = trained_recipe(path)
        saved = saved_by(recipe)
        self.rows = held_out_rows(recipe, subject.data)[: subject.limit]
        named = subject.data or recipe.data.eval or f"{recipe.data.eval_fraction:.3g} of {recipe.data.train}, held out"
        return trained_parts(recipe), {"model": recipe.model.source, "adapter": str(saved), "data": str(named)}

    def _said_by_recipes(self, subject: Subject) -> list[str]:
        """The options given that a recipe settles already."""
        given: dict[str, object] = {"MODEL": subject.model, "--adapter": subject.adapter, "--system": subject.system}
        given |= {"--prompt": self.options.prompt, "--answer-field": self.options.answer_field}
        given |= {"--chat": subject.chat, "--load-in-4bit": subject.load_in_4bit, "--dtype": subject.dtype != "auto"}
        return [name for name, value in given.items() if value]

    def _read_as_trained(self, chat: bool, system: str | None) -> None:
        """Bring the rows into the forms of training. Raises ConfigError where a template makes the prompts already."""
        from veneer.errors import ConfigError
        from veneer.evaluate.questions import as_trained

        if self.options.prompt is None:
            self.rows = as_trained(self.rows, chat=chat, system=system)
        elif chat or system is not None:
            option = "--chat makes turns of its fields" if chat else "--system belongs to turns"
            raise ConfigError(f"--prompt makes plain text of each row, and {option}: give one")

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

    def measure(self, ready: loading.Loaded | Answerer, on_progress: OnProgress) -> Perplexity | Accuracy:
        """The result; ``ready`` is what `take` gave."""
        from veneer.evaluate import accuracy
        from veneer.evaluate.perplexity import perplexity
        from veneer.evaluate.questions import QuestionReader, as_templated
        from veneer.evaluate.scoring import Batching, context_length

        options, tokenizer = self.options, ready.tokenizer
        if self.metric is not Metric.PERPLEXITY:
            reader = QuestionReader(tokenizer=tokenizer, prompt=options.prompt, answer_field=options.answer_field)
            self.questions = reader.read(self.rows)
        if not isinstance(ready, loading.Loaded):
            judge, prompts = options.judge, [question.prompt for question in self.questions]
            predictions = ready.answers(prompts, options.answering, on_progress)
            return accuracy.answer_accuracy(self.questions, predictions, judge)
        how: dict[str, Any] = {"batching": Batching(n_rows=self.batch_size), "on_progress": on_progress}
        if self.metric is Metric.LABELS:
            return accuracy.label_accuracy(ready.model, tokenizer, self.questions, options.words, **how)
        rows = self.rows if options.prompt is None else as_templated(self.rows, options.prompt, options.answer_field)
        how |= {"windows": options.windows(context_length(ready.model)), "whole_rows": options.whole_rows}
        return perplexity(ready.model, tokenizer, rows, **how)

    def write_predictions(self, path: Path, result: Any) -> None:
        """Write one JSON object a row: the right answers, the prediction, and True where it is one of them."""
        with path.open("w", encoding="utf-8") as file:
            for question, given, right in zip(self.questions, result.predictions, result.right, strict=True):
                row = {"answers": question.answers, "prediction": given, "right": right}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
