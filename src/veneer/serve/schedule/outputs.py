"""Outputs of a request, in vLLM's names. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from veneer.serve.schedule.lora_request import LoRARequest

Pooled = TypeVar("Pooled")
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Token's natural log-probability, its rank among all tokens (1 is the likeliest), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """Answer to a prompt. ``stop_reason`` is the stop string or token id that ended it.

    It is None if the end token or the length ended the answer. ``logprobs`` holds, for each token, the
    log-probabilities of the chosen token and of the likeliest, by id. ``policy`` holds the two numbers of
    ``policy_logprobs`` for each token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None
    policy: list[tuple[float, float]] | None = None

    def finished(self) -> bool:
        """Return True if the answer is complete."""
        return self.finish_reason is not None

    def add(self, delta: CompletionOutput) -> None:
        """Append the part of the answer that follows this one."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.cumulative_logprob = delta.cumulative_logprob
        if self.logprobs is not None:
            self.logprobs += delta.logprobs or []
        if self.policy is not None:
            self.policy += delta.policy or []
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class RequestStats:
    """Times of a request in seconds, by `time.perf_counter`, 0 for events that have not happened.

    ``arrival_time`` is the wall clock's. For several answers, each time is the earliest of all answers, but
    ``last_token_ts`` is the latest. The names are those of vLLM's ``RequestStateStats``, except ``num_preemptions`` and
    the numbers of drafted and accepted tokens.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """Prompt with its answers. ``error`` is the reason if a request ended with the finish reason "error".

    ``num_cached_tokens`` counts the prompt's tokens whose keys and values were in pages when its first answer began.
    ``metrics`` is None unless the answers have ended and ``disable_log_stats=False``. ``embedding`` is None unless the
    request asked for an embedding.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    lora_request: LoRARequest | None = None
    num_cached_tokens: int = 0
    metrics: RequestStats | None = None
    error: Exception | None = None
    embedding: list[float] | None = None

    def add(self, delta: RequestOutput) -> None:
        """Append the parts of the answers in ``delta``, the next output of the same request."""
        known = {output.index: output for output in self.outputs}
        for output in delta.outputs:
            if output.index in known:
                known[output.index].add(output)
            else:
                self.outputs.append(output)
        self.prompt_logprobs, self.finished = delta.prompt_logprobs, delta.finished
        self.num_cached_tokens, self.metrics, self.error = delta.num_cached_tokens, delta.metrics, delta.error


@dataclass(slots=True)
class EmbeddingOutput:
    """Embedding of a prompt, as float32 values."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Number of values."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """Classes of a prompt: the head's scores, and their probabilities (of one class: the score's sigmoid)."""

    logits: list[float]
    probs: list[float]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.probs)


@dataclass(slots=True)
class _PooledOutput(Generic[Pooled]):
    """Output of a prompt with one result. ``num_cached_tokens`` counts the tokens found in the prefix cache."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    lora_request: LoRARequest | None = None


@dataclass(slots=True)
class ClassificationRequestOutput(_PooledOutput[ClassificationOutput]):
    """Prompt with its classes."""


@dataclass(slots=True)
class EmbeddingRequestOutput(_PooledOutput[EmbeddingOutput]):
    """Prompt with its embedding."""
