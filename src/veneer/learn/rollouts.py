"""Answers drawn by an engine on the weights of a model in training, with the adapter's current state.

A rollout depends only on the base, the adapter's content, the prompt and its key, and not on other rows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.errors import AdapterNameError, ConfigError, TrainingError
from veneer.learn.live import LiveAdapter
from veneer.model.adapted.state import base_alone
from veneer.model.sites.structure import evaluation
from veneer.serve.engine import Engine
from veneer.serve.requests.checked import READS, CheckedRequest
from veneer.serve.runners.program_runner import ProgramRunner
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.outputs import CompletionOutput, FinishReason, RequestOutput
from veneer.serve.schedule.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.start import EngineOptions, start_engine


class StaleAnswerError(TrainingError):
    """Error for an answer that was not drawn by the adapter in training."""


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """Answer to a prompt. ``adapter`` is the content id of the adapter that drew it, None for the base.

    ``logprobs`` of its tokens are in nats, at the temperature and over all ids. ``kept`` are the logarithms of the mass
    that ``min_p``, ``top_k``, ``top_p`` and masks left: 0 without them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    kept: tuple[float, ...]
    adapter: str | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """Prompt with its answers."""

    prompt_ids: tuple[int, ...]
    answers: tuple[DrawnAnswer, ...]


class Rollouts:
    """Engine on a model's weights. ``options`` are those of `veneer.LLM`.

    ``memory``: "beside" packs a copy of the weights, and the model keeps its own. "one" replaces them: the
    model's layers hold the packed weights, on which adapters that are attached later train. Such a model cannot be
    merged; `PeftModel.unload` restores its own weights.

    Adapters of the model act by name, in their current state. Weights of the base must not change. Everything runs in
    the caller's thread, between two training passes.

    Raises ConfigError, TargetError, and DescriptionError for a model that has no program.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        memory: Literal["one", "beside"] = "beside",
        **options: Any,
    ) -> None:
        if memory == "one" and isinstance(model, PeftModel):
            raise ConfigError(
                "memory='one' packs a base before adapters are attached, and this model has some: load the base anew"
            )
        self.model, self._options = model, EngineOptions(tokenizer=tokenizer, **options)
        self._is_one = memory == "one"
        self._start()

    def _start(self) -> None:
        with _bare(self.model):
            self.engine: Engine = start_engine(
                self.model, self._options, program_alone=True, keeps_weights=not self._is_one, compares_bases=False
            )
        self._live: dict[str, LiveAdapter] = {}
        self._base = [*_base_modules(self.model)]
        self._places = _places(self._base)

    def _settle(self) -> None:
        """Restart the engine if the base's tensors have moved: a trainer's preparation for several processes moves
        them.
        """
        if self._places == _places(self._base):
            return
        if self._is_one:
            raise TrainingError(
                "tensors of the base have moved, and the engine holds its only copy: set memory to 'beside' "
                "(rollout_memory, rollouts.memory in a recipe)"
            )
        self._start()

    def hand_over(self, adapter: str) -> LoRARequest:
        """Hand the current state of a model's adapter to the engine, and return the request for it, with its version.

        An earlier version of the name is removed with its pages, unless it is equal. Raises AdapterNameError for an
        unknown name, NonFiniteError, and UnsaidError for an adapter with a part that the engine's program does not
        support.
        """
        self._settle()
        if adapter not in self._live:
            if not isinstance(self.model, PeftModel):
                raise AdapterNameError(f"no adapter {adapter!r}: the model has none. Give adapter=None for the base")
            runner = cast(ProgramRunner, self.engine.runner)
            self._live[adapter] = LiveAdapter(self.model, adapter, runner)
        version, packed = self._live[adapter].now()
        request = LoRARequest(adapter, 1 + list(self._live).index(adapter), version=version)
        self.engine.take(request, packed)
        return request

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | LoRARequest | None = "default",
        key: Sequence[int] = (),
        rows: Sequence[int] | None = None,
    ) -> list[DrawnPrompt]:
        """Return ``params.n`` answers to each prompt, given as token ids, by an adapter of the model (None: the base).

        The adapter acts in its current state, or in the one that was handed over. ``key`` and the prompt's number
        determine the draw; the number is the prompt's place among the prompts, unless ``rows`` gives it. Raises
        ConfigError for an invalid request, and the errors of `hand_over`.
        """
        self._settle()
        numbers = range(len(prompts)) if rows is None else rows
        request = self.hand_over(adapter) if isinstance(adapter, str) else adapter
        asked = [self.turn(ids, params, request, seed_of(*key, row)) for ids, row in zip(prompts, numbers, strict=True)]
        outputs = self._run(asked)
        return [
            DrawnPrompt(each.prompt_ids, tuple(answer_of(own, each.version) for own in outputs[each.id].outputs))
            for each in asked
        ]

    def score(
        self, sequences: Sequence[Sequence[int]], *, adapter: str | LoRARequest | None = "default"
    ) -> list[list[float]]:
        """Return the log-probabilities, in nats, of all tokens of sequences except the first, by an adapter (None: the
        base).

        Raises the errors of `draw`.
        """
        self._settle()
        request = self.hand_over(adapter) if isinstance(adapter, str) else adapter
        asked = [self.engine.asked(None, ids, replace(READS, prompt_logprobs=0), request) for ids in sequences]
        outputs = self._run(asked)
        scores = [(outputs[each.id].prompt_logprobs or [])[1:] for each in asked]
        return [
            [each[token].logprob for token, each in zip(ids[1:], own, strict=True) if each is not None]
            for ids, own in zip(sequences, scores, strict=True)
        ]

    def turn(
        self, ids: Sequence[int], params: SamplingParams, adapter: LoRARequest | None, seed: int
    ) -> CheckedRequest:
        """Return a request for an answer to token ids, by an adapter that was handed over. Raises ConfigError."""
        kind = RequestOutputKind.FINAL_ONLY
        params = replace(params, policy_logprobs=True, detokenize=False, output_kind=kind, seed=seed)
        return self.engine.asked(None, ids, params, adapter)

    @contextmanager
    def requests(self) -> Iterator[Requests]:
        """Enter a context with the engine's requests, in which the model's own modules are those of the base.

        Requests that are unanswered at its end are dropped.
        """
        requests = Requests(self.engine)
        with _bare(self.model):
            try:
                yield requests
            finally:
                requests.drop()

    def _run(self, asked: Sequence[CheckedRequest]) -> dict[str, RequestOutput]:
        """Return the outputs of requests by id. Raises the error of the first request that failed."""
        done: dict[str, RequestOutput] = {}
        with self.requests() as requests:
            for each in asked:
                requests.add(each)
            while len(requests):
                done |= {output.request_id: output for output in requests.step()}
        return done


class Requests:
    """Unanswered requests to an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[CheckedRequest] = deque()
        self._submitted: set[str] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._submitted)

    def add(self, asked: CheckedRequest) -> None:
        """Add a request, which starts as soon as the engine has room for it."""
        self._waiting.append(asked)

    def step(self) -> list[RequestOutput]:
        """Compute one batch; return the outputs of requests that ended. Raises the error of one that failed."""
        while self._waiting and self._engine.backlog.has_room([self._waiting[0]]):
            asked = self._waiting.popleft()
            self._submitted.add(asked.id)
            self._engine.submit(asked)
        ended = self._engine.step()
        for output in ended:
            self._submitted.discard(output.request_id)
            if output.error is not None:
                raise output.error
        return ended

    def drop(self) -> None:
        """End all requests without an answer."""
        self._engine.drop([*self._submitted])
        self._waiting.clear()
        self._submitted.clear()


def seed_of(*key: int) -> int:
    """Return 64 bits of a hash of whole numbers (BLAKE2) as a seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def require_drawn_by(answers: Sequence[DrawnAnswer], adapter: str) -> None:
    """Raise StaleAnswerError unless all answers were drawn by the adapter with this content id."""
    other = next((each.adapter for each in answers if each.adapter != adapter), adapter)
    if other != adapter:
        raise StaleAnswerError(
            f"an answer was drawn by {other or 'the base'}, and the adapter in training is {adapter}: it would be "
            "learned from as if it were its own. Draw with the adapter of this step"
        )


def answer_of(output: CompletionOutput, version: AdapterVersion | None) -> DrawnAnswer:
    """Return an answer of the engine with the content id of its adapter."""
    numbers = output.policy or []
    return DrawnAnswer(
        token_ids=tuple(output.token_ids),
        logprobs=tuple(own for own, _ in numbers),
        kept=tuple(kept for _, kept in numbers),
        adapter=None if version is None else version.id,
        finish_reason=output.finish_reason,
    )


def is_of_adapter(name: str) -> bool:
    """Return True for the name of a tensor that an adapter holds in a model."""
    return not all(map(is_of_base, name.split(".")))


def is_of_base(part: str) -> bool:
    """Return True for a part of a module's path that does not hold an adapter's tensors."""
    return part not in ("adapters", "copies")


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for name, child in module._modules.items():
        if child is not None and is_of_base(name):
            yield from _base_modules(child)


def _places(modules: Sequence[nn.Module]) -> list[int]:
    """Return the addresses of the base's tensors, and the ids of its modules."""
    found = []
    for module in modules:
        for held in (module._parameters, module._buffers):
            found += [tensor.data_ptr() for tensor in held.values() if tensor is not None]
        found += [id(child) for name, child in module._modules.items() if is_of_base(name)]
    return found


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """Enter a context that leaves the model the base's modules, in evaluation: the engine applies the adapters
    itself.
    """
    with evaluation(model), base_alone(model), torch.no_grad():
        yield
