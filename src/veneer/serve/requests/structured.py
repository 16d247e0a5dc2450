"""Constraints on the text of answers, through llguidance: they decide which tokens may come next."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from veneer.errors import ConfigError
from veneer.ops.memory import address
from veneer.ops.sample import WORD, bit_mask
from veneer.plain.lru import LruCache
from veneer.serve.sandbox.sandbox import Sandbox, SandboxError
from veneer.serve.schedule.forced_text import longest_forced
from veneer.serve.schedule.sampling_params import StructuredOutputsParams

_LOG = logging.getLogger(__name__)
_KEPT = 64  # compiled grammars
_KEPT_TEXT = 1 << 22  # characters of the grammars that are kept, all together
_MOST_FORCED = 10_000  # characters of a text that a grammar may force, for its forced tokens to be asked for
_KNOWN_FORCED = 256  # tokens that are kept of those that were found
_TOLD = 100  # characters of a schema in a message
_SHOWN = 800  # characters of a reason of llguidance
_SLOW_MASK = 0.5  # seconds of computing for one token; a grammar that takes longer is given up
_SLOW = 0.002  # seconds; a grammar whose forced tokens took longer is asked no more: all requests wait meanwhile


@dataclass(eq=False, slots=True)
class _Grammar:
    """A compiled grammar in its start state, with what was found while answers were generated: whether it forces tokens
    quickly, and whether it has failed.
    """

    matcher: LLMatcher
    forces: bool  # tokens that it forces are asked for
    failed: bool = False  # in one of its texts; its tables are of no use for others then

    def found_forced(self, matcher: LLMatcher) -> list[int]:
        """Return the next tokens that the grammar forces, in reverse order. If finding them is slow, set ``forces`` to
        False.
        """
        began = time.perf_counter()
        found = matcher.compute_ff_tokens()
        self.forces = time.perf_counter() - began < _SLOW
        return list(found[:_KNOWN_FORCED])[::-1]


class Forms:
    """Compiled grammars for one tokenizer. Its tables are built for the first grammar.

    The most recently used grammars are cached by their text. Any thread may call it.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ending: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ending = tokenizer, vocabulary, sorted(ending)
        self._grammars: LruCache[str, _Grammar] = LruCache(_KEPT)
        self._building = threading.Lock()
        self.sandbox: Sandbox | None = None
        """Process in which grammars are compiled first, because compiling may end it; None if grammars are trusted."""

    def form(self, asked: StructuredOutputsParams) -> TextForm:
        """Return the state of a text at its start, under the grammar of a request.

        Raises ConfigError with llguidance's reason if the grammar cannot be compiled.
        """
        text = grammar_of(asked)
        grammar = self._grammars.get(text)
        if grammar is None or grammar.failed:
            grammar = self._compiled(text, asked.sent_as)
            self._grammars.put(text, grammar)
            while sum(map(len, self._grammars)) > _KEPT_TEXT:
                self._grammars.drop_first()
        return TextForm(grammar, grammar.matcher, self._vocabulary, self._ending)

    def _compiled(self, grammar: str, sent_as: str) -> _Grammar:
        with self._building:  # of the tables one is enough
            tables = self._tables
        if self.sandbox is not None:
            _try_out(grammar, sent_as, self.sandbox)
        matcher = LLMatcher(tables, grammar, log_level=0)
        if matcher.is_error():
            raise _not_compiled(sent_as, matcher.get_error())
        if _mask_seconds(matcher, torch.zeros(-(-self._vocabulary // WORD), dtype=torch.int32)) > _SLOW_MASK:
            raise ConfigError(
                f"{sent_as} takes more than {_SLOW_MASK:g} s for the first token. Simplify the schema, regex, choice "
                "or grammar"
            )
        made = _Grammar(matcher, forces=longest_forced(grammar) <= _MOST_FORCED)
        if made.forces:  # the first time takes longest, and nobody waits here but who asks
            made.found_forced(matcher)
            made.found_forced(matcher.deep_copy())
        return made

    def prepare(self) -> None:
        """Build the tables now, which takes most of a second and blocks all other threads.

        Errors are raised by `form`.
        """
        try:
            with self._building:
                _ = self._tables
        except Exception as error:  # noqa: BLE001 - a server starts for clients that ask for no form
            _LOG.info("structured outputs cannot be prepared: %s", error)

    @cached_property
    def _tables(self) -> LLTokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._ending:
            raise ConfigError(
                "structured outputs need a fast tokenizer with an end token, which this model lacks: ask without them"
            )
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ending)
        except ValueError as error:
            raise ConfigError(
                f"this model's tokenizer is not one that llguidance reads ({error}): it needs tokens of bytes, as "
                "byte-level BPE and SentencePiece have them. Ask without structured outputs."
            ) from error


class TextForm:
    """State of an answer's text in its grammar: it decides which tokens may come next."""

    def __init__(self, grammar: _Grammar, matcher: LLMatcher, vocabulary: int, ending: Sequence[int]) -> None:
        self._grammar, self._matcher, self._vocabulary, self._ending = grammar, matcher, vocabulary, list(ending)
        self._words: Tensor | None = None
        self._is_over = False  # given up, since all answers wait while it takes long
        self._coming = list[int]()  # forced tokens that were found and not taken yet, the last one first

    def begun(self) -> TextForm:
        """Return an independent copy in this state, for one more answer."""
        return TextForm(self._grammar, self._matcher.deep_copy(), self._vocabulary, self._ending)

    def allowed(self) -> Tensor:
        """Return the bit mask of the tokens that may come next, valid until the next call.

        End tokens are allowed if the text may or must end. Nothing is allowed after a grammar has exceeded its memory
        or time.
        """
        if self._is_over or self._matcher.is_error():
            self._grammar.failed = True
            return bit_mask([], self._vocabulary)
        if self._matcher.is_stopped():
            return bit_mask(self._ending, self._vocabulary)
        if self._words is None:
            self._words = torch.zeros(-(-self._vocabulary // WORD), dtype=torch.int32)
        if _mask_seconds(self._matcher, self._words) > _SLOW_MASK:
            self._is_over, self._grammar.failed = True, True
        return self.allowed() if self._is_over else self._words

    def forced(self) -> list[int]:
        """Return the next tokens that the grammar forces, as the tokenizer divides the text; a model may divide it
        differently.

        None are returned for a grammar that may force a long text, or whose forced tokens took long to find.
        """
        if not self._coming and self._grammar.forces and not self._matcher.is_stopped():
            self._coming = self._grammar.found_forced(self._matcher)
        return self._coming[::-1]

    def take(self, token: int) -> None:
        """Advance the grammar by a token of the answer. If the grammar has ended, nothing changes."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._coming and self._coming.pop() != token:
            self._coming.clear()


def _mask_seconds(matcher: LLMatcher, words: Tensor) -> float:
    """Write the bit mask of the allowed next tokens. Return the CPU seconds that it took."""
    began = time.thread_time()
    matcher.unsafe_compute_mask_ptr(address(words), words.nbytes)
    return time.thread_time() - began


def _try_out(grammar: str, sent_as: str, sandbox: Sandbox) -> None:
    try:
        answer = sandbox.ask(grammar, {})
    except SandboxError as error:
        raise ConfigError(
            f"{sent_as} cannot be compiled: {error}. Simplify the schema, regex, choice or grammar"
        ) from error
    if "refused" in answer:
        raise _not_compiled(sent_as, answer["refused"])


def _not_compiled(sent_as: str, reason: str) -> ConfigError:
    return ConfigError(f"{sent_as} cannot be compiled: {_shown(reason)}. Correct the schema, regex, choice or grammar")


def grammar_of(asked: StructuredOutputsParams) -> str:
    """Return the grammar of structured outputs, in llguidance's format.

    Raises ConfigError for text that is not JSON, is no grammar of Lark or GBNF, or holds half of a surrogate pair.
    """
    if asked.json is not None or asked.json_object:
        return _of_schema(asked)
    field = next(name for name in ("choice", "regex", "grammar") if getattr(asked, name) is not None)
    try:
        text = _of_text(asked)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{asked.sent_as}: the {field} cannot be compiled: {_shown(str(error))}. Correct it"
        ) from error
    return text


def _of_schema(asked: StructuredOutputsParams) -> str:
    schema = {"type": "object"} if asked.json is None else asked.json
    try:
        # Piece by piece: other threads run between two of them.
        text = schema if isinstance(schema, str) else "".join(json.JSONEncoder().iterencode(schema))
        return str(LLMatcher.grammar_from_json_schema(text))
    except (TypeError, ValueError, RecursionError) as error:
        told = f"{asked.sent_as}: json={schema!r:.{_TOLD}} is not a JSON schema ({_shown(str(error))}): correct it"
        raise ConfigError(told) from error


def _of_text(asked: StructuredOutputsParams) -> str:
    """Return llguidance's form of a list of choices, a regular expression or a grammar.

    Raises ValueError or RecursionError if llguidance cannot read the expression or the grammar.
    """
    if asked.choice is not None:
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in asked.choice)))
    if asked.regex is not None:
        return str(LLMatcher.grammar_from_regex(asked.regex))
    return str(LLMatcher.grammar_from_lark(_lark(asked.grammar or "")))


def _lark(grammar: str) -> str:
    """Convert a grammar to Lark's syntax. Raises ValueError for one that is neither Lark nor GBNF."""
    try:
        return str(any_to_lark(grammar))
    except Exception as error:
        raise ValueError(str(error)) from error


def _shown(reason: str) -> str:
    """Return llguidance's error message without its parser state. Each long line and a long message are shortened."""
    said = reason.partition("\n<state>")[0]
    return _ends("\n".join(_ends(line, _SHOWN // 4) for line in said.splitlines()), _SHOWN)


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
