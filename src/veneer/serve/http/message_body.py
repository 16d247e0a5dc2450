"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from veneer.serve.http.errors import RefusedError
from veneer.serve.http.message_blocks import TextBlock, messages_of
from veneer.serve.http.protocol import ChatBody, Drawn, FunctionBody, Named, NamedTool, Several, Strict, ToolBody

_SAME = tuple(name for name in Drawn.model_fields if name != "stop")
"""Fields that a chat completion has under the same name."""


class MessageTool(Strict):
    """Function that the model may call and the client runs. ``cache_control`` is ignored."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None

    def chat(self) -> ToolBody:
        """Return the tool in the form of a chat completion's body."""
        function = FunctionBody(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return ToolBody(type="function", function=function)


class ChosenMode(Strict):
    """Choice whether functions are called; "any" requires at least one call."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False

    def chat(self) -> Literal["auto", "required", "none"]:
        """Return the choice in the form of a chat completion's body."""
        return "required" if self.type == "any" else self.type


class ChosenTool(Strict):
    """Choice of the one function that must be called."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False

    def chat(self) -> NamedTool:
        """Return the choice in the form of a chat completion's body."""
        return NamedTool.model_validate({"type": "function", "function": {"name": self.name}})


def _kind_of(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return "tool" if kind == "tool" else "mode"


MessageChoice = Annotated[
    Annotated[ChosenMode, Tag("mode")] | Annotated[ChosenTool, Tag("tool")], Discriminator(_kind_of)
]


class OutputConfig(Strict):
    """Format that the answer must have.

    ``format`` has the type json_schema, and a ``schema``. ``effort`` is ignored.
    """

    format: dict[str, Any] | None = None
    effort: str | None = None

    def chat(self) -> dict[str, Any] | None:
        """Return the format in the form of a chat completion's body; None if there is none. Raises RefusedError for
        other types.
        """
        given = self.format
        if given is None:
            return None
        if given.get("type") != "json_schema" or not isinstance(given.get("schema"), Mapping):
            raise RefusedError(
                "output_config.format must be {'type': 'json_schema', 'schema': …}: give a schema, or leave it out",
                "output_config.format",
            )
        return {"type": "json_schema", "json_schema": {"schema": given["schema"]}}


class CountTokensBody(Named):
    """Body of ``/v1/messages/count_tokens``, whose fields ``/v1/messages`` has too.

    ``cache_control`` is accepted and ignored: shared prefixes are always cached.
    """

    messages: Several[dict[str, Any]]
    system: str | Several[TextBlock] | None = None
    tools: Several[MessageTool] | None = None
    tool_choice: MessageChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("thinking")
    @classmethod
    def _as_they_are(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None and given.get("type") != "disabled":
            raise PydanticCustomError(
                "refused",
                f"type={given.get('type')!r:.100} is not offered: models are asked as they are. Leave the field out, "
                "or send {'type': 'disabled'}",
            )
        return given

    def chat(self, **more: Any) -> ChatBody:
        """Return the body as one of ``/v1/chat/completions``. Raises RefusedError for blocks of an unsupported type.

        If the last message is the assistant's, the answer continues it.
        """
        messages = messages_of(self.system, self.messages)
        goes_on = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
        choice = self.tool_choice
        return ChatBody.in_other_words(
            messages=messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tools=None if self.tools is None else [tool.chat() for tool in self.tools],
            tool_choice=None if choice is None else choice.chat(),
            parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
            response_format=None if self.output_config is None else self.output_config.chat(),
            chat_template_kwargs=self.chat_template_kwargs,
            **more,
        )


class MessagesBody(CountTokensBody, Drawn):
    """Body of ``/v1/messages``: Anthropic's fields, and in addition vLLM's sampling parameters.

    ``metadata``, ``service_tier`` and ``speed`` are accepted and ignored.
    """

    max_tokens: int = Field(ge=1)
    stop_sequences: Several[str] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    speed: str | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields of the body that change nothing."""
        own = [name for name in ("metadata", "service_tier", "speed") if getattr(self, name) is not None]
        return own + ["output_config.effort"] * bool(self.output_config and self.output_config.effort)

    def chat(self, **more: Any) -> ChatBody:
        """Return the body as one of ``/v1/chat/completions``. Raises RefusedError for blocks of an unsupported type."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return super().chat(
            max_completion_tokens=self.max_tokens,
            stop=[*(self.stop_sequences or ()), *given] or None,
            **{name: getattr(self, name) for name in _SAME},
            **more,
        )
