"""Tokens from logits, one request at a time, so that a draw does not depend on the batch.

The order is vLLM's: allowed tokens, banned words and ends, bias, penalties. Then comes the likeliest token, or
temperature, min_p, top_k, top_p and a draw. Log-probabilities are those of the model, before any of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from veneer.errors import ConfigError, NonFiniteError
from veneer.ops.sample import likeliest
from veneer.serve.outputs import Logprob, TokenLogprobs
from veneer.serve.plan import Drawn, Plan
from veneer.serve.sampling_params import SamplingParams

_NEVER = float("-inf")


class Form(Protocol):
    """Form that the text must have."""

    def allowed(self) -> Tensor:
        """Return True for each token that may come next, as (vocabulary,) booleans."""

    def take(self, token: int) -> None:
        """Advance the form by a token."""


@dataclass(frozen=True, kw_only=True)
class DrawRule:
    """Rule for drawing the tokens of one answer.

    ``key`` (two whole numbers) and a token's index in the answer determine its random number. ``ending`` ids are banned
    before ``min_tokens``; ``bad_words`` are sequences of ids that may not be completed.
    """

    params: SamplingParams
    prompt: tuple[int, ...]
    key: tuple[int, int]
    ending: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    form: Form | None = None

    @cached_property
    def is_plain(self) -> bool:
        """True if the rule needs nothing but the likeliest token, once there are ``min_tokens``."""
        params = self.params
        changed = (
            self.form, self.bad_words, params.logit_bias, params.frequency_penalty, params.presence_penalty,
        )  # fmt: skip
        free = params.allowed_token_ids is None and params.logprobs is None and params.repetition_penalty == 1
        return params.greedy and free and not any(changed)


@dataclass(slots=True)
class _State:
    rule: DrawRule
    output: list[int] = field(default_factory=list)

    @property
    def takes_likeliest(self) -> bool:
        """True where the next token is the model's likeliest, and nothing else is asked for."""
        return self.rule.is_plain and len(self.output) >= self.rule.params.min_tokens


class Sampler:
    """Sampler of the tokens of the requests that have begun."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}

    def begin(self, request_id: str, rule: DrawRule) -> None:
        """Begin a request."""
        self._states[request_id] = _State(rule)

    def end(self, request_id: str) -> None:
        """End a request."""
        self._states.pop(request_id, None)

    def greedy(self, plan: Plan) -> set[str]:
        """Return the requests of a plan that need nothing but the likeliest token."""
        return {
            s.request_id
            for s in plan.sequences
            if s.samples and not s.targets and self._states[s.request_id].takes_likeliest
        }

    def likeliest(self, logits: Tensor) -> list[int | None]:
        """Return the likeliest token of each row of logits (n, vocabulary), in one pass; None if not finite."""
        return [None if token < 0 else token for token in likeliest(logits).tolist()] if len(logits) else []

    def draw(self, request_id: str, logits: Tensor, likeliest: int | None = None) -> Drawn:
        """Return the next token of a request, from the model's logits (vocabulary,) and the likeliest token, if known.

        Raises NonFiniteError and ConfigError.
        """
        state = self._states[request_id]
        if likeliest is not None and state.takes_likeliest:
            return Drawn(likeliest)
        rule, params, raw = state.rule, state.rule.params, logits.float()
        if not bool(torch.isfinite(raw).any()) or bool(torch.isnan(raw).any()):
            raise NonFiniteError("the model's logits are not finite: its weights or an adapter's are damaged")
        changed = penalized(forbidden(raw.clone(), rule, state.output), rule, state.output)
        if float(changed.max()) == _NEVER:
            raise ConfigError("no token is allowed here: the request's constraints exclude every token")
        token = (
            int(changed.argmax()) if params.greedy else drawn(narrowed(changed, params), rule.key, len(state.output))
        )
        return Drawn(token, None if params.logprobs is None else logprobs_of(raw, token, params.logprobs))

    def take(self, request_id: str, token: int) -> None:
        """Append a drawn token to the request's answer; until then, the same token would be drawn again."""
        state = self._states[request_id]
        state.output.append(token)
        if state.rule.form is not None:
            state.rule.form.take(token)

    def score(self, request_id: str, logits: Tensor, targets: tuple[int, ...]) -> list[TokenLogprobs]:
        """Return the log-probabilities of prompt tokens, from the logits (n, vocabulary) that predict them."""
        count = self._states[request_id].rule.params.prompt_logprobs or 0
        return [logprobs_of(row.float(), token, count) for row, token in zip(logits, targets, strict=True)]


def forbidden(logits: Tensor, rule: DrawRule, output: list[int]) -> Tensor:
    """Return logits with minus infinity for forbidden tokens, and the bias added. Modifies the given logits."""
    params = rule.params
    if rule.form is not None:
        logits[~rule.form.allowed().to(logits.device)] = _NEVER
    if params.allowed_token_ids is not None:
        kept = torch.full_like(logits, _NEVER)
        allowed = torch.tensor(list(params.allowed_token_ids), device=logits.device)
        logits = kept.index_copy(0, allowed, logits[allowed])
    for word in rule.bad_words:
        if len(word) == 1 or output[1 - len(word) :] == list(word[:-1]):
            logits[word[-1]] = _NEVER
    if len(output) < params.min_tokens:
        logits[list(rule.ending)] = _NEVER
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    return logits


def penalized(logits: Tensor, rule: DrawRule, output: list[int]) -> Tensor:
    """Return logits after penalties: repetition over prompt and output, frequency and presence over output."""
    params = rule.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*rule.prompt, *output}), device=logits.device)
        there = logits[seen]
        rate = params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(there > 0, there / rate, there * rate))
    if output and (params.frequency_penalty or params.presence_penalty):
        counts = torch.bincount(torch.tensor(output, device=logits.device), minlength=len(logits))
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def narrowed(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return logits divided by the temperature, with minus infinity for tokens that min_p, top_k and top_p exclude."""
    logits = logits / params.temperature
    if params.min_p > 0:
        likely = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(likely < params.min_p * likely.max(), _NEVER)
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], _NEVER)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = torch.softmax(ordered, dim=-1).cumsum(dim=-1) - torch.softmax(ordered, dim=-1)
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).index_copy(0, order, before >= params.top_p), _NEVER
        )
    return logits


def drawn(logits: Tensor, key: tuple[int, int], place: int) -> int:
    """Return a token drawn by the softmax of logits, with the random number of the key and the place.

    Philox is a function of a key and a counter (Salmon et al. 2011), so no state has to be kept or restored.
    """
    bits = np.random.Philox(key=np.array([part % 2**64 for part in key], dtype=np.uint64), counter=[place, 0, 0, 0])
    sums = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    at = float(np.random.Generator(bits).random()) * sums[-1]
    return int(torch.searchsorted(sums, at, right=True).clamp_max(int(torch.isfinite(logits).nonzero()[-1])))


def logprobs_of(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Return natural log-probabilities by id: the token's first, then those of the ``count`` likeliest (-1: all)."""
    values = torch.log_softmax(logits, dim=-1)
    own = float(values[token])
    found = {token: Logprob(own, int((values >= own).sum()))}
    best = values.topk(len(values) if count == -1 else count)
    for rank, (value, id) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        found.setdefault(id, Logprob(value, rank))
    return found
