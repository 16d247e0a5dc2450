"""Chat templates: rendering a conversation, and finding the tokens that the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from veneer.errors import DataError

Message = Mapping[str, Any]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a conversation under the tokenizer's chat template.

    Raises DataError where there is no template or where the template refuses the conversation.
    """
    return _render(tokenizer, messages, options)["input_ids"]


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and for each whether the assistant wrote it (the end of its turn included).

    Three ways, in this order: the template's own ``{% generation %}`` markers; position, by rendering the conversation
    up to each turn, which holds for every template that only ever appends; the marked version of a well-known template
    that TRL ships. Token ids play no part, so a pad token equal to the end token does no harm.

    Raises DataError where none of the three tells the turns apart.
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
            "the chat template renders earlier turns differently once a later one follows, so the assistant's tokens "
            "cannot be told by position. Put {% generation %} … {% endgeneration %} around the assistant's turns in "
            "the template, give prompt and completion columns, or set assistant_only_loss=False"
        ) from error
    return _marked(tokenizer, messages, {**(options or {}), "chat_template": template})


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading values that two sequences share."""
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
            raise DataError("the conversation opens with an assistant turn: nothing tells where its text begins")
        before = render(tokenizer, messages[:i], {**(options or {}), "add_generation_prompt": True})
        after = render(tokenizer, messages[: i + 1], options)
        start, end = common_prefix(before, whole), common_prefix(after, whole)
        if start < len(before) or end < len(after):
            return None
        mask[start:end] = [True] * (end - start)
    return whole, mask


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> tuple[list[int], list[bool]]:
    encoded = _render(tokenizer, messages, {**(options or {}), "return_assistant_tokens_mask": True})
    return encoded["input_ids"], [bool(bit) for bit in encoded["assistant_masks"]]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None
) -> dict[str, list[int]]:
    if tokenizer.chat_template is None:
        raise DataError(
            "the data holds conversations but the tokenizer has no chat template: set tokenizer.chat_template, use an "
            "instruction-tuned base, or give prompt and completion (or text) columns"
        )
    try:
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **(options or {}))
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error
    return {key: list(values) for key, values in encoded.items()}
