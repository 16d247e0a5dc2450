"""State of one answer in progress: its computed and drawn tokens, and its end. No torch."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import takewhile

from veneer.serve.schedule.outputs import FinishReason
from veneer.serve.schedule.prefix_cache import key_of
from veneer.serve.schedule.speculation import Draft
from veneer.serve.schedule.stop_tokens import StopRule


class Status(enum.Enum):
    """State of a request: waiting (not begun, or preempted), in the batch, or ended."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """State of one answer in progress.

    ``version`` is the adapter version, and ``n_front`` the number of its virtual tokens, which precede the prompt.
    ``acts_from`` is the index of the first token that the adapter acts on. A lower ``priority`` is more urgent. Within
    one priority, the ``client`` that has received least for its ``weight`` comes first. If ``streams``, the answer is
    shown while it grows. If ``scores_prompt``, log-probabilities of the prompt's tokens are requested. If
    ``reads_only``, no token is drawn: the request ends after its prompt. If both, the hidden states of all tokens are
    requested. ``draft`` guesses its next tokens.

    ``root`` and ``owner`` enter the keys of its pages (see `prefix_cache`); if ``root`` is None, it shares no pages.
    ``n_computed`` counts the tokens whose keys and values are in pages, and ``n_front_there`` the virtual ones.
    ``n_published`` counts its pages that others can find. ``n_cached`` counts the prompt tokens that were in pages when
    it began. ``n_scored`` counts the computed log-probabilities of the prompt. ``known_keys`` caches the keys of its
    first pages.
    """

    id: str
    prompt: tuple[int, ...]
    rule: StopRule
    version: str | None = None
    n_front: int = 0
    acts_from: int = 0
    scores_prompt: bool = False
    client: Hashable = ""
    weight: float = 1.0
    priority: int = 0
    streams: bool = False
    root: bytes | None = None
    owner: bytes = b""
    draft: Draft | None = None
    reads_only: bool = False
    output: list[int] = field(default_factory=list)
    n_computed: int = 0
    n_front_there: int = 0
    n_published: int = 0
    n_cached: int | None = None
    n_scored: int = 0
    n_preempted: int = 0
    arrival: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: Exception | None = None
    known_keys: list[bytes] = field(default_factory=list)

    @property
    def n_positions(self) -> int:
        """Number of positions so far: of the virtual tokens, of the prompt, and of the drawn tokens."""
        return self.n_front + self.n_tokens

    @property
    def n_tokens(self) -> int:
        """Number of tokens so far: of the prompt, and drawn ones."""
        return len(self.prompt) + len(self.output)

    @property
    def n_left(self) -> int:
        """Number of tokens whose keys and values are still to be computed; 1 during decoding."""
        return self.n_tokens - self.n_computed

    @property
    def n_alike(self) -> int:
        """Number of next tokens that may be in one sequence of a step. The adapter acts on all of these tokens, or on
        none.
        """
        n_before = self.acts_from - self.n_computed
        return min(self.n_left, n_before) if n_before > 0 else self.n_left

    @property
    def acting(self) -> str | None:
        """Version that acts on the next token; None for the base."""
        return None if self.n_computed < self.acts_from else self.version

    @property
    def n_to_come(self) -> int:
        """Largest number of tokens that are still to be computed before the request ends."""
        return len(self.prompt) + self.rule.max_tokens - self.n_computed

    def stretch(self, n: int) -> tuple[int, ...]:
        """Return the next ``n`` tokens to compute."""
        return self.tokens(self.n_computed, self.n_computed + n)

    def keys(self, n: int, block: int) -> list[bytes]:
        """Return the keys of the first ``n`` blocks of ``block`` positions. All tokens of these blocks must be known.

        The request must have a root.
        """
        parent = self.known_keys[-1] if self.known_keys else self.root or b""
        for i in range(len(self.known_keys), n):
            first, last = (max(0, at * block - self.n_front) for at in (i, i + 1))
            parent = key_of(parent, self.tokens(first, last), self.owner_of(last))
            self.known_keys.append(parent)
        return self.known_keys[:n]

    def owner_of(self, last: int) -> bytes:
        """Return the owner in the key of a page that ends before token ``last``; empty if the adapter acts on no token
        of it.
        """
        return self.owner if last > self.acts_from else b""

    def tokens(self, first: int, last: int) -> tuple[int, ...]:
        """Return the tokens from index ``first`` up to, but not including, index ``last``."""
        n_prompt = len(self.prompt)
        if first >= n_prompt:  # it decodes, as it mostly does
            return tuple(self.output[first - n_prompt : last - n_prompt])
        return self.prompt[first:last] + tuple(self.output[max(0, first - n_prompt) : max(0, last - n_prompt)])

    def drafted(self, most: int, share: float) -> tuple[int, ...]:
        """Return at most ``most`` guesses of the next tokens, if at least a ``share`` of such guesses was right.

        No guess is a token that would end the answer.
        """
        most = min(most, self.rule.max_tokens - len(self.output) - 1)
        if self.draft is None or most < 1:
            return ()
        return tuple(takewhile(lambda token: not self.rule.stops(token), self.draft.tokens(self, most, share)))

    def unscored(self, n: int) -> tuple[int, tuple[int, ...]]:
        """Return the index, among the next ``n`` tokens, of the first one whose successor is unscored, and all such
        successors.

        Successors are prompt tokens whose log-probabilities are asked for. Without `scores_prompt` there are none.
        """
        skipped = max(0, self.n_scored - self.n_computed)
        if not self.scores_prompt:
            return 0, ()
        return skipped, self.prompt[self.n_computed + 1 + skipped : self.n_computed + 1 + n]

    def draw(self, token: int) -> None:
        """Append a drawn token, and end the request if the token ends the answer."""
        self.output.append(token)
        reason = self.rule.ends(len(self.output), token)
        self.stop_token = self.rule.reported(reason, token)
        if reason is not None:
            self.end(reason)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request, with a reason and an error if there is one."""
        self.status, self.finish_reason, self.error = Status.DONE, reason, error
