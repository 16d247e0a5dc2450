"""Perplexity of texts and of answers, in windows that fit the model's context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.data.files import require_one_form
from veneer.data.windows import Windows
from veneer.errors import DataError
from veneer.evaluate.scoring import (
    Batching,
    OnProgress,
    Scored,
    context_length,
    ignore_progress,
    log_probabilities,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """``value`` = exp(mean negative log-likelihood per token), with equal weight for every token of all rows.

    ``row_nats`` and ``row_tokens`` are the contributions of each row.
    """

    value: float
    nats_per_token: float
    n_tokens: int
    n_rows: int
    row_nats: tuple[float, ...]
    row_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows cut into windows: sequences to score, and the row of each."""

    items: tuple[Scored, ...]
    rows: tuple[int, ...]
    n_rows: int

    @classmethod
    def of(
        cls, tokenizer: Any, rows: Sequence[Mapping[str, Any]], windows: Windows, *, whole_rows: bool = False
    ) -> Texts:
        """Return the windows of the rows. Scored are the tokens of answers (completions, assistant turns), or all
        tokens if a row is plain text.

        ``whole_rows`` scores the prompts too. Raises DataError for rows of an unknown form or without a token to score.
        """
        items: list[Scored] = []
        of: list[int] = []
        for row, (ids, scored) in enumerate(_tokens(tokenizer, rows, whole_rows)):
            for begin, start, end in windows.spans(len(ids)):
                for first, last in _runs(scored[start:end], start):
                    items.append(Scored(tuple(ids[begin:end]), first - begin, last - begin))
                    of.append(row)
        if not items:
            raise DataError("no row holds a token that could be scored: each needs two tokens or more")
        return cls(tuple(items), tuple(of), len(rows))

    def judged(self, found: Sequence[Tensor]) -> Perplexity:
        """Return the perplexity, from the log-probabilities of each item's tokens."""
        sums, counts = [0.0] * self.n_rows, [0] * self.n_rows
        for row, values in zip(self.rows, found, strict=True):
            sums[row] -= float(values.double().sum())
            counts[row] += len(values)
        nats = math.fsum(sums) / sum(counts)
        return Perplexity(
            value=math.exp(nats) if nats < 700 else math.inf,
            nats_per_token=nats,
            n_tokens=sum(counts),
            n_rows=self.n_rows,
            row_nats=tuple(sums),
            row_tokens=tuple(counts),
        )


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
    """Return the perplexity of rows (see `Texts.of`), in windows that by default fit the model's context."""
    texts = Texts.of(tokenizer, rows, windows or Windows.within(context_length(model)), whole_rows=whole_rows)
    return texts.judged(log_probabilities(model, texts.items, batching, on_progress))


def _tokens(tokenizer: Any, rows: Sequence[Mapping[str, Any]], whole_rows: bool) -> list[tuple[list[int], list[bool]]]:
    """Return, for each row, its token ids, and a mask that is True for the tokens to score."""
    if not rows:
        raise DataError("the data has no rows: give at least one")
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
    """Return (start, end) of each run of consecutive True values, counted from ``offset``."""
    edges = [i for i in range(len(scored) + 1) if (i > 0 and scored[i - 1]) != (i < len(scored) and scored[i])]
    return [(a + offset, b + offset) for a, b in zip(edges[::2], edges[1::2], strict=True)]
