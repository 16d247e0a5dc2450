"""Response models of the routes, for the API description only: the routes write plain JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Answer(BaseModel):
    """Object that has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class CachedTokens(Answer):
    """Number of prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """Numbers of tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptScore(Answer):
    """Log-probability of a token of a prompt, and its rank."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class Choice(Answer):
    """One answer. ``stop_reason`` is the stop string or token that ended it.

    ``prompt_logprobs``, if requested: for each prompt token a mapping from token ids to scores.
    """

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptScore] | None] | None = None


class TextScores(Answer):
    """Log-probabilities of a text's tokens. The first token of a prompt has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Choice):
    """One text."""

    text: str
    logprobs: TextScores | None


class Completions(Answer):
    """Answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TopScore(Answer):
    """Log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenScore(TopScore):
    """Log-probability of the sampled token, and those of the likeliest tokens."""

    top_logprobs: list[TopScore]


class TokenScores(Answer):
    """Log-probabilities of all tokens of an answer."""

    content: list[TokenScore]


class CalledFunction(Answer):
    """Name of a called function, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Answer):
    """Call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """Turn of the assistant. It has ``tool_calls`` if there are any."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Choice):
    """One turn."""

    message: ChatMessage
    logprobs: TokenScores | None = None


class ChatCompletions(Answer):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(Answer):
    """Model: the base, or an adapter. An adapter's ``parent`` is the base.

    ``warning`` is present if an adapter may have been trained on another base.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]
    warning: str | None = None


class ModelList(Answer):
    """Answer of ``/v1/models``: the base, and the adapters that the client's key may see."""

    object: Literal["list"]
    data: list[ModelCard]


class OutputText(Answer):
    """Text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenScore]


class OutputMessage(Answer):
    """Item of a response: a message."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Answer):
    """Item of a response: a call of a function."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseError(Answer):
    """Reason why a response failed."""

    code: str
    message: str


class IncompleteDetails(Answer):
    """Reason why a response is incomplete."""

    reason: str


class WrittenTokens(Answer):
    """Numbers of prompt tokens found in the prefix cache, and written to it (always 0)."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(Answer):
    """Number of answer tokens spent on reasoning: always 0, since they are not told apart."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Numbers of tokens read and written."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: WrittenTokens
    output_tokens_details: ReasoningTokens


class ResponseAnswer(Answer):
    """Answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[Annotated[OutputMessage | OutputCall, Field(discriminator="type")]]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    top_logprobs: int | None
    user: str | None
    metadata: dict[str, str]
    text: dict[str, Any]
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    truncation: Literal["disabled"]
    background: Literal[False]
    store: Literal[False]
    previous_response_id: None


class AnswerText(Answer):
    """Block of a message: text."""

    type: Literal["text"]
    text: str


class ToolUse(Answer):
    """Block of a message: a call of a function."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    """Numbers of tokens. ``input_tokens`` excludes prompt tokens found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageAnswer(Answer):
    """Answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[AnswerText | ToolUse, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None
    usage: MessageUsage
