"""Drafts: guesses of an answer's next tokens, which one step computes as further rows of the sequence. No torch.

After each row the step draws a token exactly as it would without a draft. It stops at the first token that differs from
the guess. So a draft changes how many tokens a step yields, and never which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar, Protocol

from veneer.plain.field_types import check
from veneer.serve.schedule.keywords import Keywords

_METHODS = ("ngram",)
_WINDOW = 5  # tokens of an n-gram, unless it is said: vLLM's
_LETTERS = 0x110000  # that Python has: one for each id, in any vocabulary of today
_FIRST = 4  # tokens of the first n-gram draft of an answer
_LONGEST_PAUSE = 32  # tokens
_REMEMBERED = 0.5  # of what was tried, when more is


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(metaclass=Keywords):
    """vLLM's ``speculative_config`` for n-grams: if the last tokens occur earlier, the tokens after them are the guess.

    A step tries at most ``num_speculative_tokens``. The last ``prompt_lookup_max`` tokens are searched in the prompt
    and the answer, then fewer, down to ``prompt_lookup_min``. If one of the two is None, it equals the other; if both
    are, they are 5. Raises ConfigError for other methods and values.
    """

    given_to: ClassVar[str] = "speculative_config"
    not_offered: ClassVar[tuple[str, ...]] = (
        "model",
        "disable_by_batch_size",
        "draft_tensor_parallel_size",
        "revision",
    )

    method: str | None = None
    num_speculative_tokens: int | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        check(self, self._problems)

    @property
    def windows(self) -> tuple[int, int]:
        """Lengths of the shortest n-gram that is looked for, and of the longest."""
        longest = self.prompt_lookup_max or self.prompt_lookup_min or _WINDOW
        return self.prompt_lookup_min or longest, longest

    def _problems(self) -> list[str]:
        said = []
        if self.method not in _METHODS:
            said.append(f"method={self.method!r} is not offered: 'ngram' is. Give method='ngram'.")
        if self.num_speculative_tokens is None:
            said.append(
                "num_speculative_tokens is missing: it is a whole number of at least 1. Give one, 8 for example."
            )
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if value is not None and value < 1:
                said.append(f"{name}={value} is too small: at least 1. Give a larger number.")
        most, least = self.prompt_lookup_max, self.prompt_lookup_min
        if most is not None and least is not None and 1 <= most < least:
            said.append(f"prompt_lookup_min={least} is more than prompt_lookup_max={most}: at most as much. Lower it.")
        return said


class DraftedText(Protocol):
    """Prompt and answer so far: a `Request`."""

    output: list[int]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of both."""

    def tokens(self, first: int, last: int) -> tuple[int, ...]:
        """Return the tokens from index ``first`` up to, but not including, index ``last``."""


class Ngrams:
    """Guesses from the text itself: the tokens that followed the last earlier occurrence of its final n-gram.

    If fewer tokens follow there than are asked for, these tokens are repeated.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._windows, self._most = config.windows, config.num_speculative_tokens or 1
        self._letters = ""  # one for each token: a search is one call

    def guess(self, text: DraftedText, most: int) -> Sequence[int]:
        """Return at most ``most`` tokens that may follow the text."""
        new = text.tokens(len(self._letters), text.n_tokens)
        self._letters += "".join([chr(token % _LETTERS) for token in new])
        first, n, most = self._behind_longest(*self._windows), text.n_tokens, min(most, self._most)
        return [] if first is None else list(islice(cycle(text.tokens(first, min(first + most, n))), most))

    def _behind_longest(self, least: int, most: int) -> int | None:
        """Find the longest n-gram, of ``least`` to ``most`` tokens, that ends the sequence and occurs earlier in it.

        Return the index after its last earlier occurrence, or None if there is none.

        If a long ending occurs earlier, so do the shorter ones, so that bisection finds the length.
        """
        found, n = None, len(self._letters)
        most = min(most, n - 1)
        while least <= most:
            window = (least + most) // 2
            at = self._letters.rfind(self._letters[-window:], 0, n - 1)
            if at < 0:
                most = window - 1
            else:
                found, least = at + window, window + 1
        return found


@dataclass(eq=False, slots=True)
class _Source:
    """One kind of guesses, with the number of tokens to draft and the record of right ones.

    The number doubles if a whole draft was right. Otherwise it becomes one more than the number of right tokens. After
    a draft without a right token, drafts pause; each such pause is twice as long, up to `_LONGEST_PAUSE` tokens. After
    that many tokens one draft is tried again, however few tokens were right.
    """

    guess: Callable[[DraftedText, int], Sequence[int]]
    length: int
    n_tried: float = 1.0
    n_right: float = 1.0
    pause: int = 0
    resumes: int = 0
    last: int = 0

    def is_worth(self, n_output: int, share: float) -> bool:
        often = self.n_right >= share * self.n_tried
        return n_output >= self.resumes and (often or n_output >= self.last + _LONGEST_PAUSE)

    def judge(self, n_output: int, n_tried: int, n_right: int) -> None:
        self.n_tried = _REMEMBERED * self.n_tried + n_tried
        self.n_right = _REMEMBERED * self.n_right + n_right
        self.last = n_output
        self.length = max(self.length, 2 * n_tried) if n_right == n_tried else n_right + 1
        self.pause = 0 if n_right else min(2 * self.pause or 1, _LONGEST_PAUSE)
        self.resumes = n_output + self.pause


class Draft:
    """Guesses of the next tokens of one answer.

    They are the tokens that the answer's grammar forces. If there are none, they are those that followed an earlier
    equal n-gram. ``n_tried`` counts the guessed tokens that were tried, ``n_right`` those that the model then drew.
    """

    def __init__(
        self, config: SpeculativeConfig | None = None, forced: Callable[[], Sequence[int]] | None = None
    ) -> None:
        self.n_tried, self.n_right = 0, 0
        self._sources = [] if forced is None else [_Source(lambda text, most: forced(), _LETTERS)]
        self._sources += [] if config is None else [_Source(Ngrams(config).guess, _FIRST)]
        self._used: _Source | None = None

    def tokens(self, text: DraftedText, most: int, share: float) -> Sequence[int]:
        """Return at most ``most`` guesses of the next tokens, if at least a ``share`` of recent guesses was right."""
        for source in self._sources:
            n = min(most, source.length)
            guess = source.guess(text, n) if source.is_worth(len(text.output), share) else ()
            if guess:
                self._used = source
                return guess[:n]
        return ()

    def judge(self, text: DraftedText, n_tried: int, n_right: int) -> None:
        """Record how many tokens of the last guess were tried, and how many of them were drawn."""
        self.n_tried += n_tried
        self.n_right += n_right
        if self._used is not None:
            self._used.judge(len(text.output), n_tried, n_right)
