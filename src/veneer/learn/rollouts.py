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
    """Error for an answer that another adapter than the one in training generated."""


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """Answer to a prompt. ``adapter`` is a hash of the content of the adapter that drew it, or None for the base.

    ``logprobs``: the log-probability of each token in nats, at the sampling temperature, over the whole vocabulary.
    ``kept``: for each token, the logarithm of the probability mass that remained after ``min_p``, ``top_k``, ``top_p``
    and masks; 0 if none of them is set.
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
    """Engine that generates answers with the weights of a model in training. ``options`` are those of `veneer.LLM`.

    ``memory``: "beside" packs a copy of the weights, and the model keeps its own. "one" replaces the model's weights
    with the packed ones; adapters that are attached later train on these. Such a model cannot be merged;
    `PeftModel.unload` restores its own weights. Adapters of the model are chosen by name and act in their current
    state. Weights of the base must not change. Everything runs in the caller's thread, between two training passes.
    ``is_one``: ``memory`` is "one".

    Raises ConfigError, TargetError, and DescriptionError for a model that the engine does not support.
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
                "memory='one' packs a base without adapters, but this model has adapters already: load the base again"
            )
        self.model, self._options = model, EngineOptions(tokenizer=tokenizer, **options)
        self.is_one = memory == "one"
        self._start()

    def _start(self) -> None:
        with _bare(self.model):
            self.engine: Engine = start_engine(
                self.model, self._options, program_alone=True, keeps_weights=not self.is_one, compares_bases=False
            )
        self._live: dict[str, LiveAdapter] = {}
        self._base = [*_base_modules(self.model)]
        self._children = [(each, name) for each in self._base for name in each._modules if is_of_base(name)]
        self._places = _places(self._base, self._children)

    def _settle(self) -> None:
        """Restart the engine if the base's tensors have moved, as they do when a trainer prepares for several
        processes.
        """
        if self._places == _places(self._base, self._children):
            return
        if self.is_one:
            raise TrainingError(
                "tensors of the base were moved, but the engine holds their only copy: set memory to 'beside' "
                "(rollout_memory, rollouts.memory in a recipe)"
            )
        self._start()

    def hand_over(self, adapter: str) -> LoRARequest:
        """Give the engine the current state of a model's adapter, and return the request object that names this
        version.

        An earlier version of this adapter is removed with its cached pages, unless it is equal. Raises AdapterNameError
        for an unknown name, NonFiniteError, and UnsaidError for an adapter with a part that the engine does not
        support.
        """
        self._settle()
        if adapter not in self._live:
            if not isinstance(self.model, PeftModel):
                raise AdapterNameError(f"no adapter {adapter!r}: the model has none. Give adapter=None for the base")
            runner = cast(ProgramRunner, self.engine.runner)
            self._live[adapter] = LiveAdapter(self.model, adapter, runner)
        version, packed = self._live[adapter].now()
        name, number = self._named(adapter)
        request = LoRARequest(name, number, version=version)
        self.engine.take(request, packed)
        return request

    def _named(self, adapter: str) -> tuple[str, int]:
        """Return the name and the number (from 1) under which the engine knows an adapter."""
        return adapter, 1 + list(self._live).index(adapter)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | LoRARequest | None = "default",
        key: Sequence[int] = (),
        rows: Sequence[int] | None = None,
    ) -> list[DrawnPrompt]:
        """Return ``params.n`` answers to each prompt, given as token ids.

        ``adapter`` is an adapter of the model, in its current state, or a version from `hand_over`; None is the base.
        An answer's random numbers depend on ``key`` and on the prompt's number: its index, or its entry in ``rows`` if
        that is given. Raises ConfigError for an invalid request, and the errors of `hand_over`.
        """
        self._settle()
        numbers = range(len(prompts)) if rows is None else rows
        request = self.hand_over(adapter) if isinstance(adapter, str) else adapter
        asked = [self.turn(ids, params, request, seed_of(*key, row)) for ids, row in zip(prompts, numbers, strict=True)]
        outputs = self._outputs(asked)
        return [
            DrawnPrompt(each.prompt_ids, tuple(answer_of(own, each.version) for own in outputs[each.id].outputs))
            for each in asked
        ]

    def score(
        self, sequences: Sequence[Sequence[int]], *, adapter: str | LoRARequest | None = "default"
    ) -> list[list[float]]:
        """Return the log-probabilities, in nats, of all tokens of each sequence except its first.

        ``adapter`` is as for `draw`. Raises the errors of `draw`.
        """
        self._settle()
        request = self.hand_over(adapter) if isinstance(adapter, str) else adapter
        asked = [self.engine.asked(None, ids, replace(READS, prompt_logprobs=0), request) for ids in sequences]
        outputs = self._outputs(asked)
        scores = [(outputs[each.id].prompt_logprobs or [])[1:] for each in asked]
        return [
            [each[token].logprob for token, each in zip(ids[1:], own, strict=True) if each is not None]
            for ids, own in zip(sequences, scores, strict=True)
        ]

    def turn(
        self, ids: Sequence[int], params: SamplingParams, adapter: LoRARequest | None, seed: int
    ) -> CheckedRequest:
        """Return a request for an answer to token ids, by an adapter from `hand_over`. Raises ConfigError."""
        kind = RequestOutputKind.FINAL_ONLY
        params = replace(params, policy_logprobs=True, detokenize=False, output_kind=kind, seed=seed)
        return self.engine.asked(None, ids, params, adapter)

    @contextmanager
    def requests(self) -> Iterator[Requests]:
        """Enter a context for sending requests to the engine. Within it, the model's own modules run without adapters,
        because the engine applies the adapters.

        Requests that are unanswered when the context ends are dropped.
        """
        requests = Requests(self.engine)
        with _bare(self.model):
            try:
                yield requests
            finally:
                requests.drop()

    def run(self, asked: Sequence[CheckedRequest]) -> dict[str, RequestOutput]:
        """Answer requests, as many at a time as the engine has room for, and return the outputs by request id.

        A request that failed has its error in its output.
        """
        done: dict[str, RequestOutput] = {}
        with self.requests() as requests:
            for each in asked:
                requests.add(each)
            while len(requests):
                done |= {output.request_id: output for output in requests.step()}
        return done

    def _outputs(self, asked: Sequence[CheckedRequest]) -> dict[str, RequestOutput]:
        """Return the outputs of requests by id. Raises the error of the first request that failed."""
        outputs = self.run(asked)
        require_answered([outputs[each.id] for each in asked])
        return outputs


class Requests:
    """Requests that an engine has not answered yet."""

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
        """Compute one batch. Return the outputs of the requests that ended in it, including those that failed."""
        while self._waiting and self._engine.backlog.has_room([self._waiting[0]]):
            asked = self._waiting.popleft()
            self._submitted.add(asked.id)
            self._engine.submit(asked)
        ended = self._engine.step()
        self._submitted.difference_update(output.request_id for output in ended)
        return ended

    def drop(self) -> None:
        """End all requests without an answer."""
        self._engine.drop([*self._submitted])
        self._waiting.clear()
        self._submitted.clear()


def require_answered(outputs: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
    """Return the outputs. Raises the error of the first request that failed."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def seed_of(*key: int) -> int:
    """Return a 64-bit BLAKE2 hash of integers, for use as a seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def require_drawn_by(answers: Sequence[DrawnAnswer], adapter: str) -> None:
    """Raise StaleAnswerError unless the adapter with the content hash ``adapter`` generated all answers."""
    other = next((each.adapter for each in answers if each.adapter != adapter), adapter)
    if other != adapter:
        raise StaleAnswerError(
            f"an answer was drawn by {other or 'the base'}, but the adapter in training is {adapter}, and only its own "
            "answers can be learned from. Draw with the adapter of this step"
        )


def answer_of(output: CompletionOutput, version: AdapterVersion | None) -> DrawnAnswer:
    """Convert an answer of the engine. ``version`` is the adapter that generated it, or None for the base."""
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
    """Return True if a component of a module's path belongs to the base, and False if it holds an adapter's tensors."""
    return part not in ("adapters", "copies")


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for name, child in module._modules.items():
        if child is not None and is_of_base(name):
            yield from _base_modules(child)


def _places(modules: Sequence[nn.Module], children: Sequence[tuple[nn.Module, str]]) -> list[int]:
    """Return numbers that change if a tensor of the base moves or a module is replaced.

    The first are the addresses of the tensors in ``modules``. Then follow the ids of the modules in ``children``, which
    gives each as its parent and its name in the parent. Modules of an adapter, which may be added later, are not
    included.
    """
    found = []
    for module in modules:
        for held in (module._parameters, module._buffers):
            found += [tensor.data_ptr() for tensor in held.values() if tensor is not None]
    return found + [id(module._modules.get(name)) for module, name in children]


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """Enter a context in which the model has the base's modules alone, in evaluation mode: the engine applies adapters
    itself.
    """
    with evaluation(model), base_alone(model), torch.no_grad():
        yield
