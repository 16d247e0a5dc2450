"""Sampling of an answer's tokens and the end of the answer, in vLLM's names and meanings. No torch."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from veneer.errors import ConfigError
from veneer.plain.field_types import check, fits
from veneer.serve.schedule.keywords import Keywords

GREEDY_BELOW = 1e-5  # a temperature under it takes the likeliest token, as in vLLM
MAX_LOGPROBS = 20
_BIAS = 100.0
_TOLD = 100  # characters of a value in a message


class RequestOutputKind(enum.Enum):
    """Contents of each output of a request: all tokens so far, the new ones, or all once at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams(metaclass=Keywords):
    """Constraint on the text of an answer, given by exactly one field.

    It is a JSON schema (a dict, or its text), a regular expression, a list of choices, a grammar (Lark, or GBNF), or
    any JSON object. ``sent_as`` is the field of a request that asks for it, which errors name.
    """

    sent_as: ClassVar[str] = "structured_outputs"

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Collection[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [spec.name for spec in fields(self) if getattr(self, spec.name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(f"StructuredOutputsParams takes exactly one of its fields, not {given or 'none'}")
        wrong = [n for n in ("regex", "grammar") if not isinstance(getattr(self, n), (str, type(None)))]
        if wrong or not isinstance(self.json, (str, Mapping, type(None))):
            raise ConfigError(f"StructuredOutputsParams: {wrong or ['json']} must be text (json: or a mapping)")
        if self.choice is not None and not (fits(self.choice, Collection[str]) and self.choice and all(self.choice)):
            raise ConfigError(
                f"StructuredOutputsParams: choice={self.choice!r:.{_TOLD}} must be a list of strings, none empty"
            )
        if not isinstance(self.json_object, bool | None):
            raise ConfigError(
                f"StructuredOutputsParams: json_object={self.json_object!r:.{_TOLD}} must be True or None"
            )


class ResponseFormat(StructuredOutputsParams):
    """Constraint on an answer's text that the field ``response_format`` of a request asks for."""

    sent_as = "response_format"


@dataclass(kw_only=True)
class SamplingParams(metaclass=Keywords):
    """Sampling of an answer's tokens, and the end of the answer. Fields, defaults and the order of effects are vLLM's.

    ``policy_logprobs`` is veneer's own. It requests two numbers for each token: its log-probability at the temperature,
    over all ids, and the logarithm of the probability mass that masks, ``min_p``, ``top_k`` and ``top_p`` left.
    Parameters are checked when they are created, and again for each request, since fields may be set in between.

    Raises ConfigError that lists all problems.
    """

    not_offered: ClassVar[tuple[str, ...]] = (
        *("extra_args", "skip_reading_prefix_cache", "repetition_detection", "thinking_token_budget"),
        *("stream_interval", "logprob_token_ids", "skip_clone", "flat_logprobs", "best_of", "use_beam_search"),
    )

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Collection[str] | None = None
    stop_token_ids: Collection[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    bad_words: Collection[str] | None = None
    policy_logprobs: bool = False

    def __post_init__(self) -> None:
        check(self, self._problems)
        if self.logit_bias is not None:
            self.logit_bias = {i: max(-_BIAS, min(_BIAS, bias)) for i, bias in self.logit_bias.items()}

    @property
    def greedy(self) -> bool:
        """Return True if the likeliest token is taken every time."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _problems(self) -> list[str]:
        said = [
            f"{name}={getattr(self, name)!r} must be {allowed}" for name, allowed, good in self._ranges() if not good
        ]
        if self.greedy and self.n > 1:
            said.append(
                f"n={self.n} with temperature={self.temperature}: all n answers would be equal. Use n=1, or a "
                "temperature above 0"
            )
        if not all(self.stop_strings):
            said.append(f"stop={self.stop!r} holds an empty string, which would end every answer")
        if self.stop_strings and not self.detokenize:
            said.append("stop strings are looked for in the text: leave detokenize=True, or use stop_token_ids")
        if self.greedy and self.policy_logprobs:
            said.append("policy_logprobs=True: the likeliest tokens are not drawn; use a temperature above 0")
        if not self.spaces_between_special_tokens:
            said.append("spaces_between_special_tokens=False is not offered by this engine")
        return said

    def _ranges(self) -> list[tuple[str, str, bool]]:
        count = f"-1 (all), or between 0 and {MAX_LOGPROBS}"
        allowed, bad = self.allowed_token_ids, self.bad_words
        most = self.min_tokens if self.max_tokens is None or self.max_tokens < 1 else self.max_tokens
        return [
            ("n", "at least 1", self.n >= 1),
            ("presence_penalty", "between -2 and 2", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "between -2 and 2", -2 <= self.frequency_penalty <= 2),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("temperature", "between 0 and 2", 0 <= self.temperature <= 2),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", "0 or -1 (all), or at least 1", self.top_k >= -1),
            ("min_p", "between 0 and 1", 0 <= self.min_p <= 1),
            ("max_tokens", "at least 1, or None", self.max_tokens is None or self.max_tokens >= 1),
            ("min_tokens", "between 0 and max_tokens", 0 <= self.min_tokens <= most),
            ("logprobs", count, self.logprobs is None or -1 <= self.logprobs <= MAX_LOGPROBS),
            ("prompt_logprobs", count, self.prompt_logprobs is None or -1 <= self.prompt_logprobs <= MAX_LOGPROBS),
            ("allowed_token_ids", "not empty, or None", allowed is None or bool(allowed)),
            ("bad_words", "words, none of them empty or half of a surrogate pair", all(map(_is_word, bad or ()))),
        ]


def _is_word(text: str) -> bool:
    """Return True for a text that is not empty and that a tokenizer can read."""
    return bool(text) and not any("\ud800" <= letter <= "\udfff" for letter in text)
