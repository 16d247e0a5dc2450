"""Measurement of a model on rows by a metric; comparison of two results on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from veneer.errors import ShapeError
from veneer.evaluate.accuracy import Accuracy, ScoredChoice
from veneer.evaluate.metric import Answers, Asked, Metric, Passages, metric_named
from veneer.evaluate.perplexity import Perplexity
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import (
    Batching,
    OnProgress,
    acting_alone,
    context_length,
    greedy_answers,
    ignore_progress,
    log_probabilities_of_each,
)
from veneer.evaluate.statistics import Difference, paired_means, paired_shares

Result = Accuracy | Perplexity
_BY_ROW = ("predictions", "right", "row_nats", "row_tokens", "confusion")


def measure(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    metric: str | Metric = "perplexity",
    *,
    tokenizer: Any,
    prompt: str | None = None,
    answer_field: str | None = None,
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Result:
    """Return a metric of a model, with its active adapter, over rows in a form of training data.

    ``metric``: a name (``"perplexity"``, ``"exact-match"``, ``"labels"``), or an object with settings such as
    `RegexMatch`. ``prompt`` and ``answer_field`` read rows with other fields, see `QuestionReader`.

    Raises DataError that names the row, and ConfigError for unsuitable settings, prompts or texts.
    """
    reader = QuestionReader(tokenizer=tokenizer, prompt=prompt, answer_field=answer_field)
    asked = (metric_named(metric) if isinstance(metric, str) else metric).ask(reader, rows)
    return measure_each(model, asked, tokenizer=tokenizer, batching=batching, on_progress=on_progress)[0]


def measure_each(
    model: Any,
    asked: Asked,
    adapters: Sequence[str] = (),
    *,
    tokenizer: Any,
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> list[Result]:
    """Return the result of each of these adapters on the model. The name ``"__base__"`` means no adapter.

    If ``adapters`` is empty, return one result, of the model as it is. Metrics that score given tokens process all
    adapters in one pass over the base. Raises the errors of `measure`.
    """
    if isinstance(asked, Answers):
        answers = _answers_of_each(model, asked, adapters, tokenizer, batching, on_progress)
        return [asked.judged(each) for each in answers]
    scored = asked.within(context_length(model, adapters)) if isinstance(asked, Passages) else asked
    found = log_probabilities_of_each(model, scored.items, adapters or [""], batching, on_progress)
    return [scored.judged(values) for values in found]


def _answers_of_each(
    model: Any, asked: Answers, adapters: Sequence[str], tokenizer: Any, batching: Batching | None, tell: OnProgress
) -> Iterator[list[str]]:
    """Yield each adapter's answers, one adapter after another."""
    prompts = [question.prompt for question in asked.questions]
    n, n_all = len(prompts), len(prompts) * max(len(adapters), 1)
    for number, name in enumerate(adapters or [""]):

        def on_progress(done: int, total: int, before: int = number * n) -> None:
            tell(before + done, n_all)

        with acting_alone(model, name) if name else nullcontext():
            yield greedy_answers(model, tokenizer, prompts, asked.answering, batching, on_progress=on_progress)


def compare(first: Result, second: Result) -> Difference:
    """Return the paired difference of two results of one metric on the same rows.

    Raises ShapeError for results of two metrics or of different rows.
    """
    if isinstance(first, Accuracy) and isinstance(second, Accuracy):
        return paired_shares(first.right, second.right)
    if isinstance(first, Perplexity) and isinstance(second, Perplexity):
        return paired_means(first.row_nats, second.row_nats, first.row_tokens)
    raise ShapeError("an accuracy and a perplexity cannot be compared: give two results of one metric")


def numbers_of(result: Result) -> dict[str, Any]:
    """Return the figures of a result for JSON, without those of single rows."""
    found = {name: getattr(result, name) for name in result.__slots__ if name not in _BY_ROW}
    confusion = result.confusion if isinstance(result, Accuracy) else None
    if confusion is None:
        return found
    classes = {
        label: {
            "rows": confusion.n_rows(at),
            "predicted": confusion.n_predicted(at),
            "right": confusion.n_right(at),
        }
        for at, label in enumerate(confusion.labels)
    }
    return {**found, "labels": list(confusion.labels), "classes": classes, "confusion": confusion.counts}


def predictions_of(asked: Asked, result: Result, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each question: its number, prompt, right answers, prediction, and True if the prediction is
    right.

    Raises ShapeError for a perplexity, which predicts no answers.
    """
    if not isinstance(result, Accuracy):
        raise ShapeError("a perplexity has no predictions: measure an accuracy")
    questions = cast("Answers | ScoredChoice", asked).questions
    rows = zip(questions, result.predictions, result.right, strict=True)
    for number, (question, given, right) in enumerate(rows, start=1):
        text = tokenizer.decode(list(question.prompt)) if question.text is None else question.text
        yield {"row": number, "prompt": text, "answers": question.answers, "prediction": given, "right": right}
