"""Tokens from logits: collects the sampling rules of all rows of a step, for one call of `ops.sample.draw`.

The order of effects is vLLM's: allowed tokens, banned words and ends, bias, penalties. Then the likeliest token is
taken, or one is drawn by temperature, min_p, top_k and top_p. Log-probabilities are those of the model, before any of
these.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from veneer.errors import ConfigError, NonFiniteError, VeneerError
from veneer.ops.sample import NONE_ALLOWED, Draws, Ints, RowRule, bit_mask, draw
from veneer.serve.runners.policy import policy_logprobs
from veneer.serve.schedule.outputs import Logprob, TokenLogprobs
from veneer.serve.schedule.sampling_params import SamplingParams
from veneer.serve.schedule.step_plan import DrawnToken, Sampled, StepPlan

_LARGEST = 3e38  # that a float holds


class TextConstraint(Protocol):
    """Constraint on the text of an answer, such as a grammar: it decides which tokens may come next."""

    def allowed(self) -> Tensor:
        """Return the bit mask of the tokens that may come next."""

    def take(self, token: int) -> None:
        """Advance the constraint by a token of the answer."""

    def begun(self) -> TextConstraint:
        """Return an independent copy of the constraint in its present state."""

    def forced(self) -> Sequence[int]:
        """Return tokens that may be the only possible next ones."""


class Seen:
    """Ids of a prompt and its answer, each once."""

    def __init__(self, ids: Ints, known: frozenset[int]) -> None:
        self.ids, self._known, self._new = ids, known, set[int]()

    @classmethod
    def of(cls, prompt: Sequence[int]) -> Seen:
        """Return the ids of a prompt."""
        known = frozenset(prompt)
        return cls(array("i", known), known)

    def begun(self) -> Seen:
        """Return a copy, to which other ids can be added."""
        made = Seen(array("i", self.ids), self._known)
        made._new = set(self._new)
        return made

    def add(self, token: int) -> None:
        """Add a token of the answer."""
        if token not in self._known and token not in self._new:
            self._new.add(token)
            self.ids.append(token)


class _Counts:
    """Counts of an answer's tokens, as arrays of ids and counts."""

    def __init__(self) -> None:
        self.arrays = (array("i"), array("i"))
        self._places: dict[int, int] = {}

    def add(self, token: int) -> None:
        ids, counts = self.arrays
        place = self._places.setdefault(token, len(ids))
        if place == len(ids):
            ids.append(token)
            counts.append(0)
        counts[place] += 1

    def copy(self) -> _Counts:
        made = _Counts()
        made.arrays, made._places = (array("i", self.arrays[0]), array("i", self.arrays[1])), dict(self._places)
        return made


@dataclass(frozen=True, kw_only=True)
class DrawRule:
    """Rule for drawing the tokens of one answer.

    ``key`` (two whole numbers) and a token's index in the answer determine its random number. ``ending`` ids are banned
    before ``min_tokens``; ``bad_words`` are sequences of ids that may not be completed. ``seen`` are the ids for a
    repetition penalty. ``n_prompt`` is the number of the prompt's tokens.
    """

    params: SamplingParams
    key: tuple[int, int]
    ending: frozenset[int] = frozenset()
    seen: Seen | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    form: TextConstraint | None = None
    n_prompt: int = 0

    @cached_property
    def is_plain(self) -> bool:
        """Return True if the rule only needs the likeliest token, once there are ``min_tokens``."""
        params = self.params
        changed = (
            self.form, self.bad_words, params.logit_bias, params.frequency_penalty, params.presence_penalty,
        )  # fmt: skip
        free = params.allowed_token_ids is None and params.logprobs is None and params.repetition_penalty == 1
        return params.greedy and free and not any(changed)


class Row(NamedTuple):
    """Row of logits: its request, and the token that it scores; None if a token is to be drawn.

    ``after`` are the drafted tokens before it: the row is used only if these were drawn.
    """

    request_id: str
    target: int | None = None
    after: tuple[int, ...] = ()


class Sampler:
    """Sampler of the tokens of the requests that have begun."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}
        self._ahead: dict[str, _State] = {}  # after the drafted tokens that were drawn

    def begin(self, request_id: str, rule: DrawRule) -> None:
        """Begin a request."""
        self._states[request_id] = _State(rule)

    def end(self, request_id: str) -> None:
        """End a request."""
        self._states.pop(request_id, None)
        self._ahead.pop(request_id, None)

    def greedy(self, plan: StepPlan) -> set[str]:
        """Return the requests of a plan that only need the likeliest tokens."""
        return {
            s.request_id
            for s in plan.sequences
            if s.samples and not s.targets and not s.reads_only and self._states[s.request_id].takes_likeliest
        }

    def fill(self, sampled: Sampled, rows: Sequence[Row], logits: Tensor) -> None:
        """Add the tokens and log-probabilities of rows to ``sampled``, from their logits (n, vocabulary).

        A row after drafted tokens is drawn only if these were drawn.
        """
        for n_after in range(1 + max((len(row.after) for row in rows), default=0)):
            places = [i for i, row in enumerate(rows) if len(row.after) == n_after and _is_next(row, sampled)]
            if places:
                of_places = logits if len(places) == len(rows) else logits[places]
                self._fill(sampled, [rows[i] for i in places], of_places)

    def _fill(self, sampled: Sampled, rows: Sequence[Row], logits: Tensor) -> None:
        rules = [self._rule(row, logits.shape[1]) for row in rows]
        found = draw(logits, rules)
        logprobs, policy = _logprobs(found, rules), self._policy(rows, logits, rules, found.tokens)
        for i, (row, token, scored) in enumerate(zip(rows, found.tokens.tolist(), logprobs, strict=True)):
            id = row.request_id
            if token < 0:
                if not row.after:  # otherwise it fails in the next step, and the tokens before it are told first
                    sampled.failed[id] = _error(id, token)
            elif row.target is None:
                sampled.drawn.setdefault(id, []).append(DrawnToken(token, scored, policy.get(i)))
            elif scored is not None:
                sampled.prompt_logprobs.setdefault(id, []).append(scored)
        for id in sampled.failed:
            sampled.drawn.pop(id, None)
            sampled.prompt_logprobs.pop(id, None)

    def _policy(
        self, rows: Sequence[Row], logits: Tensor, rules: Sequence[RowRule], tokens: Tensor
    ) -> dict[int, tuple[float, float]]:
        """Return ``policy_logprobs`` for the rows that draw a token and request them, by index of the row."""
        places = [
            i for i, row in enumerate(rows)
            if row.target is None and self._states[row.request_id].rule.params.policy_logprobs and tokens[i] >= 0
        ]  # fmt: skip
        if not places:
            return {}
        own, kept = policy_logprobs(logits[places], [rules[i] for i in places], tokens[places])
        return dict(zip(places, zip(own.tolist(), kept.tolist(), strict=True), strict=True))

    def take(self, request_id: str, token: int) -> None:
        """Append a drawn token to the request's answer; until then, the same token would be drawn again."""
        self._states[request_id].take(token)

    def _rule(self, row: Row, vocabulary: int) -> RowRule:
        state = self._states[row.request_id]
        if row.target is not None:
            return RowRule(target=row.target, n_likeliest=_count(state.rule.params.prompt_logprobs or 0, vocabulary))
        if len(row.after) == 1:
            self._ahead[row.request_id] = state.copy()
        if row.after:
            state = self._ahead[row.request_id]  # which the rows before this one have brought here
            state.take(row.after[-1])
        return state.rule_of_next(vocabulary)


class _State:
    """Answer so far, with what the drawing of its next token depends on: its ids, and how often each was drawn."""

    def __init__(self, rule: DrawRule) -> None:
        self.rule, self.output = rule, list[int]()
        self._allowed: tuple[Tensor, ...] | None = None
        params = rule.params
        counts = bool(params.frequency_penalty or params.presence_penalty)
        self._counts = _Counts() if counts else None
        bias = params.logit_bias or {}
        self._biased = (array("i", bias), array("f", bias.values())) if bias else None

    @property
    def takes_likeliest(self) -> bool:
        """Return True if the next token is simply the model's likeliest."""
        return self.rule.is_plain and len(self.output) >= self.rule.params.min_tokens

    def copy(self) -> _State:
        form, seen = self.rule.form, self.rule.seen
        made = _State(
            replace(self.rule, form=None if form is None else form.begun(), seen=None if seen is None else seen.begun())
        )
        made.output = list(self.output)
        made._allowed = self._allowed
        made._counts = None if self._counts is None else self._counts.copy()
        return made

    def take(self, token: int) -> None:
        self.output.append(token)
        if self.rule.seen is not None:
            self.rule.seen.add(token)
        if self._counts is not None:
            self._counts.add(token)
        if self.rule.form is not None:
            self.rule.form.take(token)

    def rule_of_next(self, vocabulary: int) -> RowRule:
        """Return the rule for the next token."""
        params = self.rule.params
        masks = self._fixed_masks(vocabulary)
        return RowRule(
            allowed=masks if self.rule.form is None else (self.rule.form.allowed(), *masks),
            banned=self._banned(vocabulary),
            biased=self._biased,
            repetition=min(params.repetition_penalty, _LARGEST),
            seen=None if self.rule.seen is None else self.rule.seen.ids,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            counted=None if self._counts is None else self._counts.arrays,
            temperature=0.0 if params.greedy else params.temperature,
            min_p=params.min_p,
            top_k=params.top_k,
            top_p=params.top_p,
            key=self.rule.key,
            place=len(self.output),
            n_likeliest=None if params.logprobs is None else _count(params.logprobs, vocabulary),
        )

    def _fixed_masks(self, vocabulary: int) -> tuple[Tensor, ...]:
        if self._allowed is None:
            ids = self.rule.params.allowed_token_ids
            self._allowed = () if ids is None else (bit_mask(list(ids), vocabulary),)
        return self._allowed

    def _banned(self, vocabulary: int) -> Ints | None:
        """Return the ids that must not come next: ids that would complete bad words, and end ids before ``min_tokens``.

        Ids without logits are left out. Return None if there are no such ids.
        """
        words, output = self.rule.bad_words, self.output
        banned = [word[-1] for word in words if len(word) == 1 or output[1 - len(word) :] == list(word[:-1])]
        if len(output) < self.rule.params.min_tokens:
            banned += self.rule.ending
        return array("i", [id for id in banned if id < vocabulary]) if banned else None


def _is_next(row: Row, sampled: Sampled) -> bool:
    """Return True unless an earlier token was drawn differently from the draft."""
    drawn = sampled.drawn.get(row.request_id, [])
    return row.target is not None or row.after == tuple(each.token for each in drawn)


def _count(asked: int, vocabulary: int) -> int:
    return vocabulary if asked == -1 else min(asked, vocabulary)


def _logprobs(found: Draws, rules: Sequence[RowRule]) -> list[TokenLogprobs | None]:
    """Return each row's log-probabilities by id: first the drawn token's, then those of the likeliest tokens.

    The entry of a row that requests none is None.
    """
    if all(rule.n_likeliest is None for rule in rules):
        return [None] * len(rules)
    ids, values = (each.tolist() for each in found.likeliest)
    numbers = zip(rules, found.tokens.tolist(), found.logprobs.tolist(), found.ranks.tolist(), strict=True)
    of_rows: list[TokenLogprobs | None] = []
    at = 0
    for rule, token, own, rank in numbers:
        if rule.n_likeliest is None:
            of_rows.append(None)
            continue
        stop = at + rule.n_likeliest
        of_row = {token: Logprob(own, rank)}
        for place, (id, value) in enumerate(zip(ids[at:stop], values[at:stop], strict=True), start=1):
            of_row.setdefault(id, Logprob(value, place))
        of_rows.append(of_row)
        at = stop
    return of_rows


def _error(request_id: str, token: int) -> VeneerError:
    """Return the reason why a row has no token."""
    named = request_id.partition("#")[0]
    if token == NONE_ALLOWED:
        return ConfigError(
            f"no token is allowed here: the constraints of request {named} exclude every token, or its grammar took "
            "too much time or memory. Give it allowed_token_ids, bad_words or structured_outputs that leave one"
        )
    return not_finite("logits", request_id)


def not_finite(what: str, request_id: str) -> NonFiniteError:
    """Return the error for a request in which ``what`` is not finite."""
    return NonFiniteError(
        f"the {what} of request {request_id.partition('#')[0]} are not finite: the model's weights or an adapter's are "
        "damaged. Load files that are whole"
    )
