"""How good a model is on data: perplexity, exact or matched answers, accuracy over label words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.data.files import require_one_form
from veneer.errors import ConfigError, DataError
from veneer.evaluate.questions import Question, continuation
from veneer.evaluate.scoring import (
    Answering,
    Batching,
    OnProgress,
    Scored,
    context_length,
    greedy_answers,
    ignore_progress,
    log_probabilities,
)

Judge = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """``value`` = exp(mean negative log-likelihood of a token), every token of all rows weighing the same."""

    value: float
    nats_per_token: float
    n_tokens: int
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of right answers; ``predictions`` and ``right`` row by row."""

    value: float
    standard_error: float
    n_right: int
    n_rows: int
    predictions: tuple[str, ...]
    right: tuple[bool, ...]

    @classmethod
    def of(cls, predictions: Sequence[str], right: Sequence[bool]) -> Accuracy:
        """The accuracy of these answers; the standard error is that of a binomial share."""
        n = len(right)
        share = sum(right) / n
        return cls(
            value=share,
            standard_error=math.sqrt(share * (1 - share) / n),
            n_right=sum(right),
            n_rows=n,
            predictions=tuple(predictions),
            right=tuple(right),
        )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How rows longer than ``context`` tokens are read: in windows that begin ``stride`` tokens apart.

    A token is scored once, in the first window that holds it; the smaller the stride, the more it sees before it.
    """

    context: int = 1024
    stride: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.context:
            raise ConfigError(
                f"stride must be 1 or more and less than the context, not {self.stride} of {self.context}"
            )

    @classmethod
    def within(cls, limit: int | None, context: int | None = None, stride: int | None = None) -> Windows:
        """Windows for a context of ``limit`` tokens; by default each begins half a window after the last.

        Raises ConfigError where the model's context holds less than a window, of two tokens at the least.
        """
        if limit is not None and (context or 2) > limit:
            raise ConfigError(
                f"a window of {context or 2} tokens is more than the {limit} that the model's context holds beside the "
                "adapter's virtual tokens: ask for a smaller context"
            )
        size = context or (cls.context if limit is None else min(cls.context, limit))
        return cls(context=size, stride=max(size // 2, 1) if stride is None else stride)

    def spans(self, n_tokens: int) -> list[tuple[int, int, int]]:
        """(begin, first scored, end) of each window over a sequence; the first token is never scored."""
        spans, begin, scored = [], 0, 1
        while scored < n_tokens:
            end = min(begin + self.context, n_tokens)
            spans.append((begin, scored, end))
            begin, scored = begin + self.stride, end
        return spans


def perplexity(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    windows: Windows | None = None,
    whole_rows: bool = False,
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Perplexity:
    """Perplexity of the answers (completions, assistant turns), or of all text where a row is plain text.

    ``whole_rows`` scores the prompts too. Raises DataError for rows of no known form or without a token to score.
    """
    texts = _tokens(tokenizer, rows, whole_rows)
    windows = windows or Windows.within(context_length(model))
    items: list[Scored] = []
    for ids, scored in texts:
        for begin, start, end in windows.spans(len(ids)):
            for first, last in _runs(scored[start:end], start):
                items.append(Scored(tuple(ids[begin:end]), first - begin, last - begin))
    if not items:
        raise DataError("no row holds a token that could be scored: each needs two tokens or more")
    found = log_probabilities(model, items, batching, on_progress)
    n_tokens = sum(len(values) for values in found)
    nats = -math.fsum(float(values.double().sum()) for values in found) / n_tokens
    value = math.exp(nats) if nats < 700 else math.inf
    return Perplexity(value=value, nats_per_token=nats, n_tokens=n_tokens, n_rows=len(rows))


def answer_accuracy(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    judge: Judge,
    *,
    answering: Answering | None = None,
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Accuracy:
    """How many greedily generated answers the judge takes for right."""
    prompts = [question.prompt for question in questions]
    predictions = greedy_answers(model, tokenizer, prompts, answering, batching, on_progress=on_progress)
    return Accuracy.of(predictions, [judge(p, q.answers) for p, q in zip(predictions, questions, strict=True)])


def label_accuracy(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    labels: Sequence[str] = (),
    *,
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Accuracy:
    """How often the right label has the greatest log-probability, summed over its tokens, of all labels.

    ``labels`` default to the answers that occur. Raises DataError where a right answer is not among them, ConfigError
    where nothing precedes a label.
    """
    words = _label_words(questions, labels)
    items = []
    for question in questions:
        for word in words:
            ids, start = continuation(tokenizer, question, word)
            if not start:  # the first token of a text has no probability
                raise ConfigError(
                    f"a prompt is empty, or its first token merges with {word!r}: there is nothing to continue"
                )
            items.append(Scored(tuple(ids), start, len(ids)))
    found = log_probabilities(model, items, batching, on_progress)
    sums = [float(values.double().sum()) for values in found]
    rows = [sums[i : i + len(words)] for i in range(0, len(sums), len(words))]
    predictions = [words[row.index(max(row))].strip() for row in rows]
    right = [p in {answer.strip() for answer in q.answers} for p, q in zip(predictions, questions, strict=True)]
    return Accuracy.of(predictions, right)


def exact_match(*, fold: bool = False) -> Judge:
    """Equal to an answer, white space around it aside; ``fold``: case and runs of white space do not count either."""
    clean = _folded if fold else str.strip
    return lambda given, answers: any(clean(given) == clean(answer) for answer in answers)


def regex_match(pattern: str, *, fold: bool = False) -> Judge:
    """What the pattern finds last in the answer (its first group, if it has one) equals what it finds in the right one.

    A right answer in which the pattern finds nothing is compared as it is. Raises ConfigError for a bad pattern.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    same = exact_match(fold=fold)

    def judge(given: str, answers: Sequence[str]) -> bool:
        found = _last(compiled, given)
        right = ((_last(compiled, answer), answer) for answer in answers)
        return found is not None and same(found, [whole if part is None else part for part, whole in right])

    return judge


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return matches[-1].group(1 if pattern.groups else 0)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _label_words(questions: Sequence[Question], labels: Sequence[str]) -> list[str]:
    """The labels as completions: with the white space in front that the data's own answers have."""
    answers = {answer for question in questions for answer in question.answers}
    lead = min(answer[: len(answer) - len(answer.lstrip())] for answer in answers)
    plain = any(question.text is not None for question in questions) and not any(a != a.lstrip() for a in answers)
    lead = " " if plain and all(q.text is None or not q.text[-1:].isspace() for q in questions) else lead
    words = sorted({answer.strip() for answer in answers}) if not labels else [label.strip() for label in labels]
    unknown = sorted({answer.strip() for answer in answers} - set(words))
    if unknown:
        raise DataError(f"the data holds answers that are none of the labels {words}: {unknown[:5]}")
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ConfigError(f"labels must be two or more different words, not {words}")
    return [lead + word for word in words]


def _tokens(tokenizer: Any, rows: Sequence[Mapping[str, Any]], whole_rows: bool) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each row, and which of them are scored."""
    if not rows:
        raise DataError("the data has no rows")
    require_one_form((number, kind_of(list(row), "text")) for number, row in enumerate(rows, 1))
    kind = kind_of(list(rows[0]), "text")
    if kind == "text":  # bare: no end token is put behind it, which the text does not hold
        for number, row in enumerate(rows, 1):
            if not isinstance(row["text"], str):
                raise DataError(f"row {number}: 'text' must be a string, not {type(row['text']).__name__}")
        plain = [list(tokenizer(row["text"], verbose=False)["input_ids"]) for row in rows]
        return [(ids, [True] * len(ids)) for ids in plain]
    encoder = Encoder(tokenizer=tokenizer, kind=kind, completion_only=not whole_rows, assistant_only=not whole_rows)
    encoded = [encoder(row, number) for number, row in enumerate(rows, 1)]
    return [(row["input_ids"], [label != IGNORED for label in row["labels"]]) for row in encoded]


def _runs(scored: Sequence[bool], offset: int) -> list[tuple[int, int]]:
    """The spans of True, as positions counted from ``offset`` on."""
    edges = [i for i in range(len(scored) + 1) if (i > 0 and scored[i - 1]) != (i < len(scored) and scored[i])]
    return [(a + offset, b + offset) for a, b in zip(edges[::2], edges[1::2], strict=True)]
