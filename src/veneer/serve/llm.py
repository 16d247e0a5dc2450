"""`LLM`: vLLM's offline interface, in the caller's thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from veneer.errors import CompositionError, ConfigError, VeneerError
from veneer.plain.progress import waits_told
from veneer.serve.engine import Engine
from veneer.serve.metrics import MetricSeries
from veneer.serve.program.heads import SERVED, ScoreHead, read_head
from veneer.serve.requests.checked import READS, CheckedRequest
from veneer.serve.requests.prompts import Prompt, PromptReader
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from veneer.serve.schedule.pooling_params import PoolingParams
from veneer.serve.schedule.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.start import EngineOptions, start_engine
from veneer.serve.tool_calls.conversation import Conversation

_Read = Callable[[PromptReader, Any], tuple[str | None, list[int]]]


class _Order(NamedTuple):
    """Priorities, clients and salts of requests: one for all requests, or one for each."""

    priority: Any
    client: Any
    cache_salt: Any = None


class LLM:
    """Model that answers many prompts in one batch, each with its own adapter or none. Adapters may be of any method.

    ``options`` are vLLM's, see `EngineOptions`. Raises ConfigError, FormatError, and TargetError for a model that
    cannot be served.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, **options: Any) -> None:
        self.options: EngineOptions = EngineOptions(**options)
        named = type(model).__name__ if isinstance(model, PreTrainedModel) else model
        with waits_told(f"loading {named}"):
            self.engine = start_engine(model, self.options)
        self.llm_engine = LoadedAdapters(self.engine)
        self._waiting: list[str] = []
        self._done: dict[str, RequestOutput] = {}
        self._heads: dict[str, ScoreHead] = {}  # by version, a few rows each

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] | None = 0,
        client: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Return the answers to prompts, in order.

        ``sampling_params``, ``lora_request``, ``priority`` and ``client`` are one value for all prompts, or a list with
        one for each. A prompt is text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids``. A mapping may
        have a ``cache_salt``: only prompts of the same salt share keys and values. Requests of a lower ``priority``
        come first. Of equal ones, the ``client`` that has received least comes first; if it is None, the adapter is the
        client.

        Raises ConfigError for an invalid prompt before any is run. Raises an adapter's error (FormatError, …) if it
        does not fit; the engine stays unchanged.
        """
        order = _Order(priority, client)
        return self._complete(self._asked(_listed(prompts), sampling_params, lora_request, order), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        priority: int | Sequence[int] | None = 0,
        client: str | Sequence[str | None] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto", "string"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        cache_salt: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Return the next turns of conversations. Arguments are `generate`'s, and so are the errors.

        Conversations share keys and values only if they have the same ``cache_salt``, which is one for all or one for
        each. The chat template is the one given, or the one saved with the adapter, or the model's. Contents in several
        parts are joined to one text before the template, even if it could render parts.
        """
        if chat_template_content_format not in ("auto", "string"):
            raise ConfigError(f"chat_template_content_format={chat_template_content_format!r} must be auto or string")
        many = bool(messages) and not isinstance(messages[0], Mapping)
        how = {
            "chat_template": chat_template, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message, "tools": tools, **(chat_template_kwargs or {}),
        }  # fmt: skip
        conversations: Sequence[Any] = messages if many else [messages]
        order = _Order(priority, client, cache_salt)
        asked = self._asked(
            conversations, sampling_params, lora_request, order, lambda reader, each: reader.chat(each, how)
        )
        return self._complete(asked, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] | None = 0,
        client: str | Sequence[str | None] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return the embeddings of prompts, in order: hidden states behind the model's last norm, pooled.

        By default an embedding is the last token's state, scaled to the length 1. The other arguments are `generate`'s;
        raises as it does.
        """
        asked = self._asked(_listed(prompts), READS, lora_request, _Order(priority, client))
        pooling = _for_each(pooling_params or PoolingParams(), len(asked), "pooling_params")
        outputs = self._complete(
            [replace(each, pooling=own) for each, own in zip(asked, pooling, strict=True)], use_tqdm
        )
        return [
            EmbeddingRequestOutput(
                each.request_id,
                EmbeddingOutput(each.embedding or []),
                each.prompt_token_ids,
                num_cached_tokens=each.num_cached_tokens,
                lora_request=each.lora_request,
            )
            for each in outputs
        ]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] | None = 0,
        client: str | Sequence[str | None] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Return the classes of prompts, in order, by the heads of their adapters (``task_type`` ``"SEQ_CLS"``).

        A head reads the last token's state, as transformers' classes of decoders do; a reward model has one class.
        The arguments are `generate`'s; raises as it does, and CompositionError for an adapter without a head.
        """
        asked = _listed(prompts)
        heads = [self._head(adapter) for adapter in _for_each(lora_request, len(asked), "lora_request")]
        state = PoolingParams(pooling="last", normalize=False)
        states = self.embed(
            asked, use_tqdm=use_tqdm, pooling_params=state, lora_request=lora_request, priority=priority, client=client
        )
        return [_classified(each, head) for each, head in zip(states, heads, strict=True)]

    def _head(self, adapter: LoRARequest | None) -> ScoreHead:
        version = None if adapter is None else self.engine.versions.of(adapter)
        if version is None or not version.has_head:
            told = "the base" if version is None else f"the adapter in {version.told}"
            raise CompositionError(
                f"{told} has no head of classes: give lora_request=…, an adapter with task_type {SERVED}"
            )
        if version.id not in self._heads:
            self._heads[version.id] = read_head(Path(version.folder))
        return self._heads[version.id]

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] | None = 0,
        client: str | Sequence[str | None] | None = None,
    ) -> list[str]:
        """Queue prompts without running them; return the ids of their requests. `wait_for_completion` returns the
        answers.

        Raises QueueFullError if too many requests wait; none of the prompts is queued then.
        """
        asked = self._asked(_listed(prompts), sampling_params, lora_request, _Order(priority, client))
        self.engine.backlog.require_room(asked)
        for each in asked:
            self.engine.submit(each)
        self._waiting += [each.id for each in asked]
        return [each.id for each in asked]

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Run all enqueued prompts; return their outputs in order. A failed request has the finish reason "error"."""
        ids, self._waiting = self._waiting, []
        return self._run(ids, use_tqdm)

    def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of all prompts so far, and return True; running requests keep theirs."""
        self.engine.reset_prefix_cache()
        return True

    def get_tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return self.engine.tokenizer

    def get_metrics(self) -> list[MetricSeries]:
        """Return counts and times since the start. Raises ConfigError unless ``disable_log_stats=False``."""
        return self.engine.metrics()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the default parameters of `generate`: those of the model's generation_config.json."""
        stored = self.engine.settings.generation_defaults if self.options.generation_config == "auto" else {}
        return SamplingParams(**stored)

    def _asked(
        self, prompts: Sequence[Any], params: Any, adapters: Any, order: _Order, read: _Read = PromptReader.read
    ) -> list[CheckedRequest]:
        each_params = _for_each(params or self.get_default_sampling_params(), len(prompts), "sampling_params")
        each_adapter = _for_each(adapters, len(prompts), "lora_request")
        priority = 0 if order.priority is None else order.priority
        priorities = _for_each(priority, len(prompts), "priority")
        clients = _for_each(order.client, len(prompts), "client")
        each_place = map(_Order, priorities, clients, _for_each(order.cache_salt, len(prompts), "cache_salt"))
        found = []
        for number, given in enumerate(zip(prompts, each_params, each_adapter, each_place, strict=True)):
            try:
                found.append(self._one(*given, read))
            except VeneerError as error:
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                raise type(error)(f"{where}{error}") from error
        return found

    def _one(
        self,
        prompt: Any,
        params: SamplingParams,
        adapter: LoRARequest | None,
        place: _Order,
        read: _Read,
    ) -> CheckedRequest:
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"sampling_params={params!r} must be a SamplingParams")
        if adapter is not None and not isinstance(adapter, LoRARequest):
            raise ConfigError(f"lora_request={adapter!r} must be a LoRARequest(name, number, folder), or None")
        if adapter is not None and not self.options.enable_lora:
            raise ConfigError(
                f"adapter {adapter.name!r} is requested, but enable_lora is False: leave enable_lora out of LLM(…)"
            )
        text, ids = read(self.engine.readers.of(adapter), prompt)
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else place.cache_salt
        asked = self.engine.asked(
            text, ids, params, adapter, priority=place.priority, client=place.client, cache_salt=salt
        )
        asked.params.output_kind = RequestOutputKind.FINAL_ONLY
        return asked

    def _complete(self, asked: Sequence[CheckedRequest], use_tqdm: bool) -> list[RequestOutput]:
        outputs = self._run([each.id for each in asked], use_tqdm, deque(asked))
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def _run(
        self, ids: Sequence[str], use_tqdm: bool, left_over: deque[CheckedRequest] | None = None
    ) -> list[RequestOutput]:
        """Return the answers to requests. Those in ``left_over`` are submitted as soon as there is room."""
        left = set(ids) - set(self._done)
        try:
            # None: no bar where stderr is no terminal, since a file would keep every state of it
            disable = None if use_tqdm else True
            with tqdm(total=len(ids), initial=len(ids) - len(left), desc="prompts", disable=disable) as bar:
                while left:
                    while left_over and self.engine.backlog.has_room([left_over[0]]):
                        self.engine.submit(left_over.popleft())
                    if not self.engine.has_work:
                        self.engine.wait()
                    for output in self.engine.step():
                        self._done[output.request_id] = output
                        bar.update(output.request_id in left)
                        left.discard(output.request_id)
        except BaseException:
            self.engine.drop(ids)
            raise
        return [self._done.pop(id) for id in ids]


def _classified(state: EmbeddingRequestOutput, head: ScoreHead) -> ClassificationRequestOutput:
    scores = head.scores(state.outputs.embedding)
    found = scores.sigmoid() if len(scores) == 1 else scores.softmax(dim=0)
    return ClassificationRequestOutput(
        state.request_id,
        ClassificationOutput(scores.tolist(), found.tolist()),
        state.prompt_token_ids,
        num_cached_tokens=state.num_cached_tokens,
        lora_request=state.lora_request,
    )


class LoadedAdapters:
    """Adapters of an `LLM` by name and number, as vLLM's ``llm.llm_engine`` has them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter now. Raises FormatError, TargetError or ConfigError if it does not fit."""
        self._engine.add_adapter(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Drop an adapter; requests in flight keep it. Return False if no adapter has this number."""
        if lora_id not in self.list_loras():
            return False
        self._engine.remove_adapter(lora_id)
        return True

    def list_loras(self) -> set[int]:
        """Return the numbers of the known adapters."""
        return {request.adapter_id for request in self._engine.adapters}

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter loaded. Raises AdapterNameError if there is none of this number."""
        self._engine.pin_adapter(lora_id)
        return True


def _listed(prompts: Any) -> list[Prompt]:
    """Return the prompts as a list; a list of numbers is a single prompt."""
    if isinstance(prompts, (str, Mapping)) or (isinstance(prompts, Sequence) and _all_numbers(prompts)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts={prompts!r} must be a prompt or a list of prompts")
    return list(prompts)


def _all_numbers(given: Sequence[Any]) -> bool:
    return bool(given) and all(isinstance(each, int) for each in given)


def _for_each(given: Any, n: int, name: str) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        return [given] * n
    if len(given) != n:
        raise ConfigError(f"{len(given)} {name} for {n} prompts: give one for all, or one for each")
    return list(given)
