"""Conversations as prompts: chat templates, and message contents of one or several texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from veneer.errors import ConfigError
from veneer.serve.sandbox.plain_template import is_plain
from veneer.serve.sandbox.sandbox import Sandbox, SandboxError
from veneer.serve.sandbox.time_limit import within

_ROLES = ("assistant", "developer", "system", "tool", "user")  # others only if the template names them
_SECONDS = 5.0  # a template takes milliseconds; one that never ends would hold its thread, and fill the memory
_LONGEST_ROLE = 64  # characters that are told
_MOST_TEXT = 1 << 24  # characters of a text that a process sends back
Conversation = Sequence[Mapping[str, Any]]

TEMPLATE_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Arguments of `apply_chat_template` itself, and its name for the conversation; all others go to the template."""


class Rendering:
    """Rendering of chat templates. With ``sandbox``, this process renders only plain templates of the model itself;
    the sandbox renders all others.
    """

    def __init__(self, model_tokenizer: Any) -> None:
        self._tokenizer = model_tokenizer
        self._plain: dict[str, bool] = {}
        self.sandbox: Sandbox | None = None

    def text(self, tokenizer: Any, turns: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> str:
        """Return the text of messages. Raises TimeoutError, SandboxError, and errors of the template."""
        template = str(tokenizer.get_chat_template(how.get("chat_template"), how.get("tools")))
        if self.sandbox is None or self._is_harmless(template):
            return within(_SECONDS, lambda: str(tokenizer.apply_chat_template(turns, tokenize=False, **how)))
        more = tokenizer.special_tokens_map | {name: value for name, value in how.items() if name != "chat_template"}
        told = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
        answer = self.sandbox.ask(template, {"messages": told, "how": more, "most": _MOST_TEXT})
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return str(answer["text"])

    def _is_harmless(self, template: str) -> bool:
        own = self._tokenizer.chat_template
        if template not in (own.values() if isinstance(own, dict) else (own,)):
            return False
        if template not in self._plain:
            self._plain[template] = is_plain(template)
        return self._plain[template]


def chat_text(
    tokenizer: Any, messages: Conversation, how: Mapping[str, Any], rendering: Rendering | None = None
) -> str:
    """Return the text that a chat template renders from messages; ``how`` are arguments of `apply_chat_template`.

    Raises ConfigError if there is no template, if the template refuses the messages or takes too long, for an unknown
    role, and for content that is no text. Raises SandboxError if the template ended the sandbox's process.
    """
    template = tokenizer.chat_template if how.get("chat_template") is None else how["chat_template"]
    if template is None:
        raise ConfigError("this model has no chat template: give chat_template, or a prompt that is plain text")
    turns = [_turn(number, message) for number, message in enumerate(messages)]
    if not turns:
        raise ConfigError("messages is empty: give at least one, as {'role': 'user', 'content': '…'}")
    _require_known_roles(turns, str(template))
    if how.get("add_generation_prompt") and how.get("continue_final_message"):
        raise ConfigError("add_generation_prompt and continue_final_message exclude each other: set one to False")
    try:
        return (rendering or Rendering(tokenizer)).text(tokenizer, turns, how)
    except SandboxError as error:
        raise SandboxError(
            f"the chat template was not run to its end: {error}. Shorten the messages, or correct the template"
        ) from error
    except TimeoutError as error:
        raise ConfigError(
            f"the chat template takes {error}, so it was stopped: shorten the messages, or correct the template"
        ) from error
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the chat template refuses the messages: {error}") from error


def _require_known_roles(turns: Sequence[Mapping[str, Any]], template: str) -> None:
    """Raise ConfigError for a role that is neither a usual one nor in the template: many templates drop such turns."""
    numbers = {turn["role"]: number for number, turn in reversed(list(enumerate(turns)))}
    for role in sorted(numbers.keys() - set(_ROLES), key=lambda role: numbers[role]):
        if f"'{role}'" not in template and f'"{role}"' not in template:
            raise ConfigError(
                f"messages[{numbers[role]}].role={role[:_LONGEST_ROLE]!r} is unknown: {', '.join(_ROLES)} are known, "
                "and roles that the chat template names. Give one of them"
            )


def _turn(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": text_of(number, message)}


def text_of(number: int, message: Mapping[str, Any]) -> str | None:
    """Return a message's content as one text; None if it has none. Raises ConfigError with the message's number."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"messages[{number}]={message!r:.100} is not a message: give a role and a content")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        wrong = [part for part in content if not isinstance(part, Mapping) or not isinstance(part.get("text"), str)]
        if wrong:
            raise ConfigError(f"messages[{number}]: only parts of the type text are read, not {wrong[0]!r:.100}")
        return "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ConfigError(
            f"messages[{number}].content={content!r:.100} is not text: give a string, or parts of the type text"
        )
    return content
