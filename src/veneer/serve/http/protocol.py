"""Bodies of requests: OpenAI's fields, and vLLM's in addition. Unknown ones are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from veneer.errors import ConfigError
from veneer.serve.http.errors import RefusedError
from veneer.serve.http.field_limits import problem_of
from veneer.serve.requests.calls import Calls, calls_of
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.schedule.sampling_params import (
    MAX_LOGPROBS,
    RequestOutputKind,
    ResponseFormat,
    SamplingParams,
    StructuredOutputsParams,
)
from veneer.serve.tool_calls.conversation import TEMPLATE_ARGUMENTS, Conversation
from veneer.serve.tool_calls.functions import Function, Tools
from veneer.serve.tool_calls.messages import with_calls

_SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens", "prompt_logprobs"),
    *("include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words"),
)
"""Fields that SamplingParams has under the same name."""
_FIELD = re.compile(r"\b(\w+)=")  # what an error of SamplingParams is about
_ID = re.compile(r"-?[0-9]{1,18}")
_MOST_NAMES = 1024  # entries of a mapping whose values are checked one by one
_MOST_UNKNOWN = 10  # fields that are told
T = TypeVar("T")


class _First(FailFast):
    """Validator that stops at a list's first wrong entry, so that a million wrong entries are one error."""

    __hash__ = object.__hash__  # which a union asks for


Several = Annotated[list[T], _First()]


class Strict(BaseModel):
    """Body that refuses unknown fields, naming the known ones, and fields beyond their limits.

    Numbers must be numbers: strings and booleans are not converted.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        known = cls.model_fields
        names: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        unknown = (name for name in names if name not in known)
        first = list(islice(unknown, _MOST_UNKNOWN))  # of a hundred thousand no more are looked at
        if first:
            raise ValidationError.from_exception_data(cls.__name__, [_extra(name, list(known)) for name in first])
        large = _too_large(given) if isinstance(given, Mapping) else []
        if large:
            raise ValidationError.from_exception_data(cls.__name__, large)
        return given


def _too_large(given: Mapping[str, Any]) -> list[InitErrorDetails]:
    found = [(name, problem_of(name, value)) for name, value in given.items()]
    return [
        InitErrorDetails(type=PydanticCustomError("too_large", "{said}", {"said": said}), loc=(name,), input=None)
        for name, said in found
        if said is not None
    ]


def _extra(name: str, known: list[str]) -> InitErrorDetails:
    error = PydanticCustomError("extra_forbidden", "unknown field", {"known": known})
    return InitErrorDetails(type=error, loc=(name,), input=None)


def prompts_of(given: Any) -> list[Any]:
    """Return the prompts of a field that is text, ids, or a list of either."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class StreamOptions(Strict):
    """Options of a stream: what it contains besides the answer. Events are never padded."""

    include_obfuscation: bool | None = None
    include_usage: bool = False
    continuous_usage_stats: bool = False


class FunctionBody(Strict):
    """Function that a model may call. If any function is ``strict``, the arguments of all calls fit their schemas."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Strict):
    """Tool of a chat completion."""

    type: Literal["function"]
    function: FunctionBody


class _Named(Strict):
    name: str


class NamedTool(Strict):
    """Choice of the one function that must be called."""

    type: Literal["function"]
    function: _Named


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedTool, Tag("function")],
    Discriminator(lambda given: "mode" if isinstance(given, str) else "function"),
]


def few(given: Any) -> Any:
    """Return a value unchanged. Raises PydanticCustomError for a mapping with too many entries."""
    if isinstance(given, Mapping) and len(given) > _MOST_NAMES:
        raise PydanticCustomError(
            "too_many_entries", f"{len(given)} entries are too many: at most {_MOST_NAMES} are allowed. Send fewer"
        )
    return given


def _id(given: Any) -> Any:
    """Convert a token id from text to int, because keys of JSON objects are text. Return any other value unchanged."""
    return int(given) if isinstance(given, str) and _ID.fullmatch(given) else given


Few = Annotated[dict[T, float], BeforeValidator(few)]
TokenId = Annotated[int, BeforeValidator(_id)]


class Named(Strict):
    """Model that a body asks for: the base or an adapter by name, or a mix (adapter names to weights)."""

    model: str | None = None
    adapter: Few[str] | None = None


class Hinted(Strict):
    """OpenAI's fields that never change an answer. They are accepted, and listed in `ignored`."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields of the body that change nothing."""
        return [name for name in Hinted.model_fields if getattr(self, name) is not None]


class Drawn(Named):
    """Fields of all routes that generate tokens. Only requests with the same ``cache_salt`` share cached prefixes."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Several[str] | None = None
    stop_token_ids: Several[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logit_bias: Few[TokenId] | None = None
    structured_outputs: dict[str, Any] | None = None
    cache_salt: str | None = None
    stream: bool = False


class Body(Drawn, Hinted):
    """Fields of completions and chat completions."""

    n: int = 1
    max_tokens: int | None = None
    include_stop_str_in_output: bool = False
    allowed_token_ids: Several[int] | None = None
    bad_words: Several[str] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None

    @property
    def n_choices(self) -> int:
        """Number of answers requested."""
        return max(self.n, 1)

    def params(self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return the sampling parameters of the body; missing ones are the model's defaults.

        Raises ConfigError; RefusedError if a field of the body is at fault.
        """
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        own = {"max_tokens": max_tokens, "logprobs": logprobs, "output_kind": kind, "structured_outputs": self._form()}
        try:
            return SamplingParams(**{**defaults, **given} | own)
        except ConfigError as error:
            said = str(error).removeprefix("SamplingParams: ").replace(", or None", ", or null")  # in words of JSON
            names = _FIELD.findall(said)
            raise RefusedError(said, next((n for n in names if n in self.model_fields_set), None)) from error

    def _form(self) -> StructuredOutputsParams | None:
        asked = self.response_format or {}
        kind = asked.get("type", "text")
        if kind not in ("text", "json_object", "json_schema"):
            raise ConfigError(f"response_format.type={kind!r} must be one of text, json_object, json_schema")
        if self.structured_outputs is not None:
            return StructuredOutputsParams(**self.structured_outputs)
        if kind == "json_object":
            return ResponseFormat(json_object=True)
        if kind == "text":
            return None
        schema = asked.get("json_schema")
        if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
            raise ConfigError("response_format of the type json_schema needs json_schema.schema, a mapping")
        return ResponseFormat(json=schema["schema"])


class CompletionBody(Body):
    """Body of ``/v1/completions``. ``logprobs``: number of likeliest tokens listed beside the sampled token.

    With ``echo``, ``prompt_logprobs`` defaults to ``logprobs``, and ``max_tokens`` may be 0.
    """

    prompt: str | Several[str] | Several[int] | Several[Several[int]]
    max_tokens: int | None = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Return True if the answer contains the prompt's log-probabilities. Such an answer is not streamed."""
        return self.echo and self.logprobs is not None

    @property
    def n_choices(self) -> int:
        """Number of answers requested, to all prompts together."""
        return len(prompts_of(self.prompt)) * super().n_choices

    def read(self, reader: PromptReader, calls: Calls | None = None) -> list[tuple[str | None, list[int]]]:
        """Return the prompts, each as text and ids. Raises ConfigError; RefusedError if there is no prompt."""
        found = [reader.read(prompt) for prompt in prompts_of(self.prompt)]
        if not found:
            raise RefusedError("prompt is empty: give text, token ids, or a list of either", "prompt")
        return [(reader.text(ids) if text is None and self.echo else text, ids) for text, ids in found]

    def calls(self, reader: PromptReader) -> None:
        """Return None: text completions have no tool calls."""

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the body's sampling parameters. Raises ConfigError; RefusedError for 0 tokens without ``echo``."""
        if self.max_tokens == 0 and not self.echo:
            raise RefusedError(
                "max_tokens=0 returns nothing without echo: set echo=true, or max_tokens to at least 1", "max_tokens"
            )
        params = self.params(defaults, 1 if self.max_tokens == 0 else self.max_tokens, self.logprobs)
        if not self.scores_prompt:
            return params
        most = self.logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        return replace(params, prompt_logprobs=most, output_kind=RequestOutputKind.FINAL_ONLY)


class ChatBody(Body):
    """Body of ``/v1/chat/completions``. ``max_tokens`` is the old name of ``max_completion_tokens``."""

    messages: Several[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Several[ToolBody] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @classmethod
    def in_other_words(cls, **fields: Any) -> ChatBody:
        """Return the chat completion body that corresponds to a body of another route, from these fields.

        Raises RefusedError for an invalid field, such as one that joins several fields and exceeds its limit.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise RefusedError(f"{name}: {problem['msg']}", name) from error

    @property
    def ignored(self) -> list[str]:
        """Given fields that change nothing; among them ``reasoning_effort``, ``verbosity`` and ``prediction``."""
        own = ("reasoning_effort", "verbosity", "prediction")
        return [*super().ignored, *(name for name in own if getattr(self, name) is not None)]

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters of the body. Raises ConfigError."""
        if self.top_logprobs is not None and not (self.logprobs and 0 <= self.top_logprobs <= MAX_LOGPROBS):
            raise ConfigError(
                f"top_logprobs={self.top_logprobs} needs logprobs=true and lies between 0 and {MAX_LOGPROBS}"
            )
        given = self.max_completion_tokens
        longest = self.max_tokens if given is None else given
        return self.params(defaults, longest, (self.top_logprobs or 0) if self.logprobs else None)

    def read(self, reader: PromptReader, calls: Calls | None = None) -> list[tuple[str | None, list[int]]]:
        """Return the conversation as one prompt (text and ids), which lists the functions of ``calls``. Raises
        ConfigError.
        """
        messages: Conversation = self.messages
        how, format = self._template(), None
        has_calls = any(message.get("tool_calls") for message in messages)
        if has_calls:
            format = reader.call_format(self.chat_template)
        if (has_calls and format is None) if calls is None else calls.in_words:
            return [reader.chat_in_words(messages, how, () if calls is None else calls.tools.functions)]
        if has_calls:
            messages = with_calls(messages, format)
        return [reader.chat(messages, how if calls is None else {**how, "tools": calls.shown})]

    def calls(self, reader: PromptReader) -> Calls | None:
        """Return the tool calls that an answer may have; None if it may have none. Raises RefusedError."""
        try:
            tools = self._tools()
            if tools is None:
                return None
            return calls_of(tools, reader, self.chat_template, hides=self.skip_special_tokens)
        except ConfigError as error:
            raise RefusedError(str(error), "tools") from error

    def _tools(self) -> Tools | None:
        given, choice = self.tools or (), self.tool_choice
        told = [tool.function for tool in given]
        functions = [
            Function(name=f.name, description=f.description, parameters=f.parameters, strict=bool(f.strict))
            for f in told
        ]
        named = choice.function.name if isinstance(choice, NamedTool) else None
        mode = choice if isinstance(choice, str) else "auto"
        tools = Tools(functions, mode, named, parallel=self.parallel_tool_calls is not False)
        return None if mode == "none" or not functions else tools

    def _template(self) -> dict[str, Any]:
        """Return the arguments of the chat template."""
        more = self.chat_template_kwargs or {}
        taken = sorted(TEMPLATE_ARGUMENTS & more.keys())
        if taken:
            raise ConfigError(
                f"chat_template_kwargs holds {', '.join(taken)}: only variables that the chat template itself reads "
                "are allowed there"
            )
        own = {} if self.chat_template is None else {"chat_template": self.chat_template}
        shown = {
            "add_generation_prompt": self.add_generation_prompt, "continue_final_message": self.continue_final_message
        }  # fmt: skip
        return {**own, **shown, **more}
