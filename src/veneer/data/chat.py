"""Chat templates: rendering a conversation, and locating the assistant's tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import load_response_template
from trl.chat_template_utils import get_training_chat_template

from veneer.errors import DataError

Message = Mapping[str, Any]
_ROLES = {"system", "developer", "user", "assistant", "tool"}


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a conversation under the tokenizer's chat template.

    Raises DataError if there is no template or if the template rejects the conversation.
    """
    return _render(tokenizer, messages, options)["input_ids"]


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and a mask of the assistant's tokens, the end of its turn included.

    Three methods are tried in this order. First come the template's own ``{% generation %}`` markers. The second is by
    position: the conversation is rendered up to each turn, which works for every append-only template. The third is
    TRL's marked version of a well-known template. Token ids are not used, so a pad token equal to the end token does no
    harm.

    Raises DataError if none of the three separates the turns.
    """
    if "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (tokenizer.chat_template or ""):
        return _marked(tokenizer, messages, options)
    by_position = _by_position(tokenizer, messages, options)
    if by_position is not None:
        return by_position
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise DataError(
            f"{_why_not_by_position(tokenizer, messages, options)}, so the assistant's tokens cannot be found by "
            "position. Put {% generation %} … {% endgeneration %} around the assistant's turns in the template, give "
            "prompt and completion columns, or set assistant_only_loss=False"
        ) from error
    return _marked(tokenizer, messages, {**(options or {}), "chat_template": template})


def with_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None, response: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template of a Jinja file. The template is saved with the tokenizer.

    ``response`` is a file with a response template of transformers (JSON), which says how tool calls are read from an
    answer. Without files the tokenizer is unchanged. Raises DataError if a file cannot be read or is not a template.
    """
    if response is not None:
        tokenizer.response_template = _response_template(response)
    if file is None:
        return tokenizer
    try:
        template = Path(file).read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    except OSError as error:
        raise DataError(f"the chat template {file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, TemplateError) as error:
        raise DataError(f"{file} is no chat template: {error}") from error
    tokenizer.chat_template = template
    return tokenizer


def _response_template(file: str) -> dict[str, Any]:
    try:
        template: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        load_response_template(template)
    except OSError as error:
        raise DataError(
            f"the response template {file} cannot be read: {error.strerror}. Give a file of JSON"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{file} is no response template: {error}. Write one as transformers' chat response parsing describes it"
        ) from error
    return template


class _Generation(Extension):
    """Extension that reads ``{% generation %} … {% endgeneration %}``, transformers' marks around the assistant's
    turns.
    """

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Return the template's nodes between the two marks, so that the marks themselves have no effect."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def template_error(tokenizer: Any, messages: Sequence[Mapping[str, Any]], error: TemplateError) -> DataError:
    """Return the error for a template that is damaged, or that refuses a conversation."""
    if isinstance(error, TemplateSyntaxError):
        return DataError(
            f"the tokenizer in {tokenizer.name_or_path} has a damaged chat template: {error}, line {error.lineno}. "
            "Mend its chat_template.jinja, or save the tokenizer again"
        )
    roles = ", ".join(str(message.get("role")) for message in messages)
    return DataError(f"the chat template refuses a conversation with the roles {roles}: {error}")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _by_position(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> tuple[list[int], list[bool]] | None:
    whole = render(tokenizer, messages, options)
    mask = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise DataError(
                "the conversation opens with an assistant turn: its text has no known start. Begin with a user turn."
            )
        before = render(tokenizer, messages[:i], {**(options or {}), "add_generation_prompt": True})
        after = render(tokenizer, messages[: i + 1], options) if i + 1 < len(messages) else whole
        start, end = common_prefix(before, whole), common_prefix(after, whole)
        if start < len(before) or end < len(after):
            return None
        mask[start:end] = [True] * (end - start)
    return whole, mask


def _why_not_by_position(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> str:
    """Return the reason why the tokens of assistant turns cannot be found by rendering a conversation's beginnings: the
    template renders earlier turns differently, or a token spans two turns.
    """

    def text(n: int, **more: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages[:n]), tokenize=False, **{**(options or {}), **more}))

    whole = text(len(messages))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    parts = [part for i in answers for part in (text(i, add_generation_prompt=True), text(i + 1))]
    if all(whole.startswith(part) for part in parts):
        return (
            "the tokenizer joins the end of one turn and the beginning of the next into one token (end turns, and what "
            "opens an answer, with a special token or a line break)"
        )
    return "the chat template renders earlier turns differently once a later one follows"


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> tuple[list[int], list[bool]]:
    encoded = _render(tokenizer, messages, {**(options or {}), "return_assistant_tokens_mask": True})
    return encoded["input_ids"], [bool(bit) for bit in encoded["assistant_masks"]]


def _require_known_roles(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Raise DataError for an uncommon role that the template does not contain, because many templates drop such turns
    silently.
    """
    unknown = sorted({str(m.get("role")) for m in messages} - _ROLES)
    strange = [role for role in unknown if role not in str(tokenizer.chat_template)]
    if strange:
        raise DataError(
            f"a message has the role {', '.join(map(repr, strange))}, which the chat template does not know; roles are "
            f"{', '.join(sorted(_ROLES))}"
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> dict[str, list[int]]:
    if tokenizer.chat_template is None:
        raise DataError(
            "the data holds conversations but the tokenizer has no chat template: set tokenizer.chat_template, use an "
            "instruction-tuned base, or give prompt and completion (or text) columns"
        )
    _require_known_roles(tokenizer, messages)
    try:
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **(options or {}))
    except TemplateError as error:
        raise template_error(tokenizer, messages, error) from error
    return {key: list(values) for key, values in encoded.items()}
