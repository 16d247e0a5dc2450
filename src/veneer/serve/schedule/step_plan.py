"""Plan of a step, and its results: numbers alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from veneer.errors import VeneerError
from veneer.serve.schedule.outputs import TokenLogprobs


class PlannedSequence(NamedTuple):
    """Consecutive tokens of one request that a step computes.

    ``tokens`` are their ids, at the positions ``start``, ``start + 1``, …; ``pages`` hold the positions, ``block`` in
    each. The first ``n_front`` positions of a sequence hold the adapter's virtual tokens. The first ``n_front_there``
    of them are in the pages already; the rest are written in this step. If ``samples``, a token is drawn after the last
    one. The last ``n_drafted`` tokens are guesses: a token is drawn before each of them too, as long as all earlier
    guesses were drawn. ``targets`` are tokens whose log-probabilities are requested; they follow the tokens from index
    ``first_scored`` on. If ``reads_only``, no token is drawn or scored, and hidden states are requested instead.
    ``version`` is the adapter version that acts on all of the tokens; None for the base.
    """

    request_id: str
    version: str | None
    tokens: tuple[int, ...]
    start: int
    n_front: int
    n_front_there: int
    pages: tuple[int, ...]
    samples: bool
    first_scored: int = 0
    targets: tuple[int, ...] = ()
    n_drafted: int = 0
    reads_only: bool = False

    @property
    def drafted(self) -> tuple[int, ...]:
        """Guesses among the tokens."""
        return self.tokens[len(self.tokens) - self.n_drafted :]

    @property
    def decodes(self) -> bool:
        """Return True if it reads nothing of a prompt."""
        return self.samples and len(self.tokens) == 1 + self.n_drafted


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Sequences of a step, grouped by adapter version, the base's first."""

    sequences: tuple[PlannedSequence, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Number of rows of the step."""
        return sum(len(sequence.tokens) for sequence in self.sequences)


class DrawnToken(NamedTuple):
    """Drawn token, with the requested log-probabilities (the drawn token's first) and the two numbers of
    ``policy_logprobs``.
    """

    token: int
    logprobs: TokenLogprobs | None = None
    policy: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results of a step, by request: the drawn tokens or the error, and log-probabilities of prompt tokens.

    ``hidden`` has the hidden states (n, width) of requests with ``reads_only``. After a draft, the drawn tokens are the
    guesses that were right, followed by one more token.
    """

    drawn: dict[str, list[DrawnToken]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[str, VeneerError] = field(default_factory=dict)
    hidden: dict[str, Any] = field(default_factory=dict)
