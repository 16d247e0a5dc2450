"""Incremental detokenization: text is output once it is certain, so that a character of several tokens comes whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # tokens of the prompt that the first of the answer is read behind
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of an answer, decoded after the prompt, so that a space between the two belongs to the answer."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that one more token makes certain; empty within a character."""
        self._ids.append(token)
        return self._next(final=False)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._next(final=True)

    def read(self, tokens: Sequence[int], *, final: bool) -> str:
        """Return the text of many tokens, as repeated `add` gives it, and `finish` if they are ``final``."""
        before = self._decode(self._ids)
        now = self._decode([*self._ids, *tokens])
        if _UNFINISHED not in now and len(now) >= len(before):
            return now[len(before) :]
        return "".join(self.add(token) for token in tokens) + (self.finish() if final else "")

    def _next(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False))
