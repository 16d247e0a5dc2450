"""Prompts in their input formats, and their ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from veneer.errors import ConfigError, FormatError
from veneer.plain.lru import LruCache
from veneer.serve.tool_calls.conversation import Conversation, Rendering, chat_text
from veneer.serve.tool_calls.described import as_text, description_of
from veneer.serve.tool_calls.format import CallFormat
from veneer.serve.tool_calls.functions import Function
from veneer.serve.tool_calls.read import format_of

_FORMATS = 8  # of calls, by chat templates
_LONG = 1 << 16  # characters
Prompt = str | Sequence[int] | Mapping[str, Any]


class PromptReader:
    """Reader of prompts with a tokenizer. ``most`` is the number of tokens that a prompt may have.

    ``templates`` are the chat templates to use in place of the tokenizer's; `chat` refuses more than one. ``ends`` are
    tokens that end an answer, in addition to the model's. ``no_chat`` is the reason why `chat` refuses conversations
    without a template of their own; "" if it does not. ``rendering`` is that of the model's own reader. A text that is
    too long for any tokens is refused before tokenization, which takes seconds for megabytes.
    """

    def __init__(
        self,
        tokenizer: Any,
        most: int,
        templates: Sequence[str] = (),
        ends: Collection[int] = frozenset(),
        no_chat: str = "",
        rendering: Rendering | None = None,
    ) -> None:
        self.tokenizer, self.most, self.no_chat = tokenizer, most, no_chat
        self.templates, self.ends = tuple(templates), frozenset(ends)
        self.rendering = rendering or Rendering(tokenizer)
        self._formats: LruCache[str, tuple[CallFormat | None]] = LruCache(_FORMATS)

    def read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return a prompt's text, if it has one, and its ids. Raises ConfigError for an invalid or too long prompt."""
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids"}
            if not known & set(prompt) or set(prompt) - known - {"cache_salt"}:
                raise ConfigError(
                    f"a prompt that is a mapping has {sorted(known)}, and may have cache_salt; not {sorted(prompt)}"
                )
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), self.read(prompt["prompt_token_ids"])[1]
            return self.read(prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self._ids(prompt)
        if isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
            return None, [int(id) for id in prompt]
        raise ConfigError(f"{prompt!r} is no prompt: give text, a list of token ids, or a mapping with one of them")

    def chat(self, messages: Conversation, how: Mapping[str, Any]) -> tuple[str, list[int]]:
        """Return the prompt (text and ids) that the chat template renders from messages.

        Raises as `chat_text` and `read` do, and FormatError if the adapter's template cannot be read.
        """
        how = {**how, "chat_template": self._template(how.get("chat_template"))}
        text = chat_text(self.tokenizer, messages, how, self.rendering)
        return text, self._ids(text, add_special_tokens=False)

    def chat_in_words(
        self, messages: Conversation, how: Mapping[str, Any], functions: Sequence[Function]
    ) -> tuple[str, list[int]]:
        """Return the prompt of a conversation if the chat template does not show tools: functions are described in
        words.

        The description is in the system message, or in the first user message if the template refuses or drops the
        system's. Raises as `chat` does.
        """
        description = description_of(functions)
        try:
            found = self.chat(as_text(messages, description, "system"), how)
            if description in found[0]:
                return found
        except ConfigError:
            if not description:
                raise
        return self.chat(as_text(messages, description, "user"), how)

    def call_format(self, template: str | None = None) -> CallFormat | None:
        """Return the format of tool calls in the chat template that `chat` uses. Return None if the template shows no
        calls.

        Raises as `chat` does if there is no template to use.
        """
        used = self._template(template)
        found = self._formats.get(used or "")
        if found is None:
            found = (format_of(self.tokenizer, used, self.rendering),)
            self._formats.put(used or "", found)
        return found[0]

    def _template(self, given: str | None) -> str | None:
        """Return the chat template of the request or of its adapter. Return None to use the tokenizer's own.

        Raises FormatError if the adapter supports no chats, and ConfigError if the adapters of a mix have different
        templates.
        """
        if given is None and self.no_chat:
            raise FormatError(self.no_chat)
        if given is not None or not self.templates:
            return given
        if len(self.templates) > 1:
            raise ConfigError(
                "the adapters of this mix were trained with different chat templates: give "
                "chat_template, or a prompt that is plain text"
            )
        return self.templates[0]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens too. Ids that the tokenizer does not have add no text."""
        known = [id for id in ids if 0 <= id < len(self.tokenizer)]
        return str(self.tokenizer.decode(known, clean_up_tokenization_spaces=False))

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text. Raises ConfigError if the text has too many characters for any allowed number of
        tokens.
        """
        return self._ids(text, add_special_tokens=add_special_tokens)

    def _ids(self, text: str, **how: Any) -> list[int]:
        if len(text) > self.most and len(text) > self.most * self._longest:
            raise ConfigError(
                f"this model's maximum context length is {self.most} tokens of at most {self._longest} characters, and "
                f"the prompt has {len(text)} characters: shorten it"
            )
        if not _is_text(text):
            raise ConfigError("the prompt holds half of a surrogate pair, which is no character: leave it out")
        return self._encoded(text, **how)  # `Engine.asked` refuses what is too long

    def _encoded(self, text: str, **how: Any) -> list[int]:
        """Return the ids of a text. A long one is encoded without offsets, since freeing them stops all threads for
        long.
        """
        if len(text) < _LONG or not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return list(self.tokenizer(text, verbose=False, **how)["input_ids"])
        self.tokenizer("", **how)  # sets the tokenizer behind it to neither pad nor truncate
        [found] = self.tokenizer.backend_tokenizer.encode_batch_fast([text], **how)
        return list(found.ids)

    @cached_property
    def _longest(self) -> int:
        """Return the number of characters of the longest token."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return max(map(len, self.tokenizer.get_vocab()))
        one = self.tokenizer.backend_tokenizer.id_to_token  # the whole vocabulary at once holds everybody up
        return max(len(one(id) or "") for id in range(len(self.tokenizer)))


def _is_text(text: str) -> bool:
    """Return False for a text with lone surrogates, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
