"""Incremental detokenization: text is output once it is certain, so that a character of several tokens is never
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_CONTEXT = 6  # tokens of the prompt that the first of the answer is read behind
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of an answer, decoded as the continuation of the prompt, so that a space between the two belongs to the
    answer.

    A tokenizer of the tokenizers library decodes with its own stream. For any other, each new token decodes the last
    tokens twice. If the stream fails at a token, the rest of the answer is decoded in this way too.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._ids = list(prompt[-_CONTEXT:])
        self._read = len(self._ids)  # of the ids those whose text is out
        self._stream: DecodeStream | None = None
        # A stream behind half a character would tell the text of the context.
        if _streams(tokenizer) and not self._decode(self._ids).endswith(_UNFINISHED):
            self._stream = DecodeStream(ids=self._ids, skip_special_tokens=skip_special_tokens)

    def add(self, token: int) -> str:
        """Add a token. Return the new text that later tokens cannot change; empty if a character is incomplete."""
        self._ids.append(token)
        if self._stream is None:
            return self._next(final=False)
        try:
            text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # noqa: BLE001 - tokenizers has no class of its own for a text that changes behind its end
            self._stream = None
            return self._next(final=False)
        if not text:
            return ""
        self._go_on()
        return str(text)

    def finish(self) -> str:
        """Return the text that was held back."""
        self._stream = None  # it does not tell it
        return self._next(final=True)

    def read(self, tokens: Sequence[int], *, final: bool) -> str:
        """Return the text of many tokens, as repeated `add` gives it.

        If they are ``final``, include the text of `finish`.
        """
        before = self._decode(self._ids)
        now = self._decode([*self._ids, *tokens])
        if _UNFINISHED not in now and len(now) >= len(before):
            return now[len(before) :]
        return "".join(self.add(token) for token in tokens) + (self.finish() if final else "")

    def _next(self, final: bool) -> str:
        before = self._decode(self._ids[: self._read])
        now = self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not final):
            return ""
        self._go_on()
        return now[len(before) :]

    def _go_on(self) -> None:
        """Forget all ids except those that were decoded last, the context in which the next ids are decoded."""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False))


def _streams(tokenizer: Any) -> bool:
    """Return True if the tokenizer decodes by the unchanged methods of transformers' fast tokenizers.

    Its text is then exactly that of its backend from the library tokenizers.
    """
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._decode is PreTrainedTokenizerFast._decode
        and kind.decode is PreTrainedTokenizerBase.decode
    )
