"""Plan of a step, and its results: numbers alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.errors import VeneerError
from veneer.serve.outputs import TokenLogprobs


class PlannedSequence(NamedTuple):
    """Stretch of one request's tokens.

    ``tokens`` are the ids to compute, at the positions ``start``, ``start + 1``, …; the ``n_front`` positions before
    the first token of a sequence hold the adapter's virtual tokens, which are put there with ``start == n_front``.
    ``pages`` hold the positions, ``block`` in each. ``samples``: a token is drawn behind the last one. The
    log-probabilities of ``targets`` are asked for, which follow the tokens from ``first_scored`` on.
    """

    request_id: str
    version: str | None
    tokens: tuple[int, ...]
    start: int
    n_front: int
    pages: tuple[int, ...]
    samples: bool
    first_scored: int = 0
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Sequences of a step, those of one adapter version side by side and the base's first."""

    sequences: tuple[PlannedSequence, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Rows of the step."""
        return sum(len(sequence.tokens) for sequence in self.sequences)


class Drawn(NamedTuple):
    """Token that was drawn, with the log-probabilities that were asked for, the chosen one's first."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results of a step, by request: the token drawn, or why none was, and log-probabilities of prompt tokens."""

    drawn: dict[str, Drawn] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[str, VeneerError] = field(default_factory=dict)
