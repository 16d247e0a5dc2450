"""Answers of a given form, through llguidance: the tokens that may come next so that the text fits the form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from veneer.errors import ConfigError
from veneer.serve.sampling_params import StructuredOutputsParams


class Forms:
    """Forms of requests for one tokenizer; its tables are built when the first form is asked for."""

    def __init__(self, tokenizer: Any, vocabulary: int, ending: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ending = tokenizer, vocabulary, sorted(ending)
        self._tables: LLTokenizer | None = None

    def form(self, asked: StructuredOutputsParams) -> TextForm:
        """Return a form in its start state. Raises ConfigError with llguidance's reason if it cannot be compiled."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._ending:
            raise ConfigError("structured outputs need a fast tokenizer with an end token, which this model lacks")
        if self._tables is None:
            self._tables = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ending)
        matcher = LLMatcher(self._tables, grammar_of(asked), log_level=0)
        if matcher.is_error():
            raise ConfigError(f"structured_outputs cannot be compiled: {matcher.get_error()}")
        return TextForm(matcher, self._vocabulary, self._ending)


class TextForm:
    """State of one text in its form: the tokens that may come next."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ending: Sequence[int]) -> None:
        self._matcher, self._vocabulary, self._ending = matcher, vocabulary, list(ending)

    def allowed(self) -> Tensor:
        """Return True for each token that may come next, as (vocabulary,) booleans.

        End tokens are allowed if the text may or must end.
        """
        found = torch.zeros(self._vocabulary, dtype=torch.bool)
        if self._matcher.is_stopped():
            found[self._ending] = True
            return found
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        found[: len(bits)] = torch.from_numpy(bits[: self._vocabulary].copy()).bool()
        return found

    def take(self, token: int) -> None:
        """Advance the grammar by a token of the answer; a grammar that has ended stays ended."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def grammar_of(asked: StructuredOutputsParams) -> str:
    """Return the grammar of structured outputs, in llguidance's form. Raises ConfigError for text that is no JSON."""
    if asked.choice is not None:
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in asked.choice)))
    if asked.regex is not None:
        return str(LLMatcher.grammar_from_regex(asked.regex))
    if asked.grammar is not None:
        return str(LLMatcher.grammar_from_lark(any_to_lark(asked.grammar)))
    schema = {"type": "object"} if asked.json is None else asked.json
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return str(LLMatcher.grammar_from_json_schema(text))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"structured_outputs: json={schema!r} is not a JSON schema: {error}") from error
