"""Body of ``/v1/responses``: OpenAI's fields. Fields that need a stored response are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from veneer.serve.http.errors import RefusedError
from veneer.serve.http.protocol import ChatBody, Drawn, FunctionBody, Hinted, NamedTool, Several, Strict, ToolBody
from veneer.serve.http.response_items import messages_of
from veneer.serve.schedule.sampling_params import MAX_LOGPROBS

_REFUSED = {
    "previous_response_id": "no response is stored: send the earlier turns in input",
    "conversation": "no conversation is stored: send the earlier turns in input",
    "prompt": "no prompt is stored: send instructions and input",
    "background": "no response is stored: wait for it, or read its stream",
    "truncation": "input is never truncated: shorten it, and leave the field out or send 'disabled'",
}
_ALLOWED = {"background": False, "truncation": "disabled"}
_LOGPROBS = "message.output_text.logprobs"
_SAME = (*Drawn.model_fields, "chat_template_kwargs", "parallel_tool_calls")
"""Fields that a chat completion has under the same name."""


class TextOptions(Strict):
    """Format that the text must have. ``format`` has the type text, json_object, or json_schema with a ``schema``."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(Strict):
    """Hints on reasoning, accepted and ignored."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Strict):
    """Options of a stream. Events are never padded, whatever ``include_obfuscation`` says."""

    include_obfuscation: bool | None = None


class ResponseTool(FunctionBody):
    """Function that the model may call and the client runs."""

    type: Literal["function"]

    def chat(self) -> ToolBody:
        """Return the tool in the form of a chat completion's body."""
        return ToolBody(type="function", function=FunctionBody(**self.model_dump(exclude={"type"})))


class NamedFunction(Strict):
    """Choice of the one function that must be called."""

    type: Literal["function"]
    name: str

    def chat(self) -> NamedTool:
        """Return the choice in the form of a chat completion's body."""
        return NamedTool.model_validate({"type": "function", "function": {"name": self.name}})


ResponseChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedFunction, Tag("function")],
    Discriminator(lambda given: "mode" if isinstance(given, str) else "function"),
]


class ResponsesBody(Drawn, Hinted):
    """Body of ``/v1/responses``: OpenAI's fields, and in addition vLLM's sampling parameters.

    Nothing is stored, even if ``store`` is true or left out. Fields of type null need stored responses: they are
    refused, unless their value asks for none.
    """

    input: str | Several[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: Several[ResponseTool] | None = None
    tool_choice: ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Several[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None

    @field_validator(*_REFUSED, mode="before")
    @classmethod
    def _stored(cls, given: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if given is not None and given != _ALLOWED.get(name):
            raise PydanticCustomError("refused", _REFUSED[name])
        return given

    @property
    def ignored(self) -> list[str]:
        """Fields of the body that change nothing. The user and the metadata are not among them, as the response repeats
        both.
        """
        own = ["reasoning"] * (self.reasoning is not None) + ["text.verbosity"] * bool(
            self.text and self.text.verbosity
        )
        return [*(name for name in super().ignored if name not in ("user", "metadata")), *own]

    @property
    def scores(self) -> bool:
        """Return True if the tokens' log-probabilities are asked for."""
        return self.top_logprobs is not None or _LOGPROBS in (self.include or ())

    @property
    def format(self) -> dict[str, Any]:
        """The body's ``text.format``, or ``{"type": "text"}`` if it has none."""
        return (self.text and self.text.format) or {"type": "text"}

    def chat(self) -> ChatBody:
        """Return the body as one of ``/v1/chat/completions``. Raises RefusedError for items of an unsupported type."""
        return ChatBody.in_other_words(
            messages=messages_of(self.instructions, self.input),
            max_completion_tokens=self.max_output_tokens,
            response_format=_response_format(self.format),
            logprobs=self.scores,
            top_logprobs=self.top_logprobs,
            tools=None if self.tools is None else [tool.chat() for tool in self.tools],
            tool_choice=self.tool_choice.chat() if isinstance(self.tool_choice, NamedFunction) else self.tool_choice,
            **{name: getattr(self, name) for name in _SAME},
        )


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a response's ``text.format`` to the ``response_format`` of a chat completion."""
    kind = given.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise RefusedError(f"text.format.type={kind!r} must be one of text, json_object, json_schema", "text.format")
    if kind != "json_schema":
        return {"type": kind}
    if not isinstance(given.get("schema"), Mapping):
        raise RefusedError("text.format of the type json_schema needs a schema, a mapping", "text.format.schema")
    return {"type": kind, "json_schema": {"schema": given["schema"]}}
