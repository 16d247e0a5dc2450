"""Prompts as token ids: one text, a conversation, or a row of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from veneer.data.chat import render, template_error
from veneer.data.column_templates import fill_template
from veneer.data.reader import RowReader
from veneer.errors import ConfigError, DataError

Message = dict[str, str]
Row = Mapping[str, Any]


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation under the chat template, up to where the assistant's answer starts.

    Raises ConfigError if the tokenizer has no chat template, and DataError if it is damaged or refuses the roles.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            "this model has no chat template, so it cannot chat: use `veneer generate`, which sends plain text"
        )
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise template_error(tokenizer, messages, error) from error
    return list(encoded["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str, *, system: str | None = None, raw: bool = False) -> list[int]:
    """Return a prompt's token ids: as one user turn, or as plain text if ``raw`` or if the model has no chat template.

    Raises ConfigError for a ``system`` message without a chat template.
    """
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise ConfigError(
                "--system needs a chat template; with --raw, or a model without one, put it in the prompt"
            )
        return list(tokenizer(prompt)["input_ids"])
    turns = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(tokenizer, [*turns, {"role": "user", "content": prompt}])


@dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Reader of rows (``messages``, or ``prompt``) as prompts. ``prompt``: a template over a row's fields."""

    prompt: str | None = None
    system: str | None = None
    raw: bool = False

    def read(self, row: Row, tokenizer: Any) -> list[int]:
        """Return the token ids of a row's prompt, without an answer that the row holds.

        Raises DataError for a row without a question, ConfigError for settings that do not fit the tokenizer.
        """
        turns = row.get("messages") if self.prompt is None else None
        if turns is None:
            text = row.get("prompt") if self.prompt is None else fill_template(self.prompt, row)
            if isinstance(text, list):
                turns = text
            elif not isinstance(text, str) or not text:
                raise DataError(
                    f"its fields are {sorted(row)}: give it a field prompt or messages, or a template over its fields "
                    "(--prompt 'Question: {question}')"
                )
            else:
                return encode_prompt(tokenizer, text, system=self.system, raw=self.raw)
        read = RowReader(system=self.system).read({"messages": turns}, "messages")["messages"]
        if read[-1]["role"] == "assistant":
            read = read[:-1]  # the answer that is known
        if not read:
            raise DataError("no turn comes before the answer, so nothing is asked: add a turn of the user")
        return render(tokenizer, read, {"add_generation_prompt": True})
