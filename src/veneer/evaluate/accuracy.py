"""Accuracy: generated answers compared with the right ones, and choices among labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.data.asked_rows import pattern_of_answers
from veneer.errors import ConfigError, DataError
from veneer.evaluate.confusion import Confusion
from veneer.evaluate.questions import Question, continuation
from veneer.evaluate.scoring import Scored
from veneer.evaluate.statistics import Interval, wilson_interval

MOST_LABELS = 200  # of answers that nobody named: each row is scored with every one of them
Judge = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of right answers with its 95% interval (Wilson); ``predictions`` and ``right`` row by row.

    ``confusion`` is set if the answers are a choice among labels.
    """

    value: float
    interval: Interval
    n_right: int
    n_rows: int
    predictions: tuple[str, ...]
    right: tuple[bool, ...]
    confusion: Confusion | None = None

    @classmethod
    def of(cls, predictions: Sequence[str], right: Sequence[bool], confusion: Confusion | None = None) -> Accuracy:
        """Return the accuracy of these answers."""
        n_right, n = sum(right), len(right)
        return cls(
            value=n_right / n,
            interval=wilson_interval(n_right, n),
            n_right=n_right,
            n_rows=n,
            predictions=tuple(predictions),
            right=tuple(right),
            confusion=confusion,
        )


def answer_accuracy(questions: Sequence[Question], predictions: Sequence[str], judge: Judge) -> Accuracy:
    """Return the share of answers, one to each question, that the judge accepts."""
    return Accuracy.of(predictions, [judge(p, q.answers) for p, q in zip(predictions, questions, strict=True)])


@dataclass(frozen=True, slots=True)
class ScoredChoice:
    """Questions as a choice among ``labels``: each question is paired with every label, as sequences to score."""

    questions: Sequence[Question]
    labels: tuple[str, ...]
    items: tuple[Scored, ...]

    @classmethod
    def of(cls, tokenizer: Any, questions: Sequence[Question], labels: Sequence[str] = ()) -> ScoredChoice:
        """Return the choice. ``labels`` default to the answers in the data.

        Raises DataError if a right answer is not among the labels, and ConfigError if nothing precedes a label.
        """
        words = _label_words(questions, labels)
        items = []
        for question in questions:
            for word in words:
                ids, start = continuation(tokenizer, question, word)
                if not start:  # the first token of a text has no probability
                    raise ConfigError(
                        f"a prompt is empty, or its first token merges with {word!r}: there is nothing to continue. "
                        "Give each question a longer prompt"
                    )
                items.append(Scored(tuple(ids), start, len(ids)))
        return cls(questions, tuple(word.strip() for word in words), tuple(items))

    def judged(self, found: Sequence[Tensor]) -> Accuracy:
        """Return the accuracy, from the log-probabilities of each item's tokens."""
        n = len(self.labels)
        sums = [float(values.double().sum()) for values in found]
        rows = [sums[i : i + n] for i in range(0, len(sums), n)]
        predictions = [self.labels[row.index(max(row))] for row in rows]
        answers = [[answer.strip() for answer in question.answers] for question in self.questions]
        right = [given in own for given, own in zip(predictions, answers, strict=True)]
        # Where several answers are right and one of them was given, the row is of its class.
        classes = [given if given in own else own[0] for given, own in zip(predictions, answers, strict=True)]
        return Accuracy.of(predictions, right, Confusion.of(self.labels, classes, predictions))


def exact_match(*, fold: bool = False) -> Judge:
    """Return a judge that compares an answer with the right ones, ignoring white space around it.

    ``fold``: also ignore case and runs of white space.
    """
    clean = _folded if fold else str.strip
    return lambda given, answers: any(clean(given) == clean(answer) for answer in answers)


def regex_match(pattern: str, *, fold: bool = False) -> Judge:
    """Return a judge that compares the last match of ``pattern`` in an answer with the last match in a right answer.

    If the pattern has a group 1, only this part of a match is compared. A right answer without a match is compared
    whole. Raises ConfigError for a bad pattern.
    """
    compiled = pattern_of_answers(pattern)
    same = exact_match(fold=fold)

    def judge(given: str, answers: Sequence[str]) -> bool:
        found = _last(compiled, given)
        right = ((_last(compiled, answer), answer) for answer in answers)
        return found is not None and same(found, [whole if part is None else part for part, whole in right])

    return judge


def require_few(words: Sequence[str]) -> None:
    """Raise ConfigError if unnamed labels, taken from the answers, are too many for a choice."""
    if len(words) > MOST_LABELS:
        raise ConfigError(
            f"the data holds {len(words)} different answers, such as {words[0]!r:.60}: labels are a choice among a few "
            "words. Name them, or compare generated answers instead (exact-match, regex)"
        )


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return matches[-1].group(1 if pattern.groups else 0)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _label_words(questions: Sequence[Question], labels: Sequence[str]) -> list[str]:
    """Return the labels as completions, with the same leading white space as the data's own answers."""
    answers = {answer for question in questions for answer in question.answers}
    lead = min(answer[: len(answer) - len(answer.lstrip())] for answer in answers)
    plain = any(question.text is not None for question in questions) and not any(a != a.lstrip() for a in answers)
    lead = " " if plain and all(q.text is None or not q.text[-1:].isspace() for q in questions) else lead
    words = sorted({answer.strip() for answer in answers}) if not labels else [label.strip() for label in labels]
    if not labels:
        require_few(words)
    unknown = sorted({answer.strip() for answer in answers} - set(words))
    if unknown:
        raise DataError(
            f"the data holds answers that are none of the labels {words}: {unknown[:5]}. Add them to the labels, or "
            "leave these rows out"
        )
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ConfigError(f"labels must be two or more different words, not {words}")
    return [lead + word for word in words]
