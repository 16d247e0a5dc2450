"""The loop of serving: take in what was asked, plan, run, commit, and tell what came of it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.errors import AdapterNameError, ConfigError, VeneerError
from veneer.serve.adapter_pool import AdapterVersion
from veneer.serve.answer import Answer, decoded
from veneer.serve.inbox import Inbox
from veneer.serve.lora_request import LoRARequest
from veneer.serve.outputs import RequestOutput, TokenLogprobs
from veneer.serve.plan import Plan, Sampled
from veneer.serve.request import Request, Status, StopRule
from veneer.serve.runner import Runner
from veneer.serve.sampler import DrawRule
from veneer.serve.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.scheduler import Scheduler
from veneer.serve.structured import Forms
from veneer.serve.versions import Versions

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Of the model: the number of its ids, those that end an answer, its defaults of sampling; of the engine: the seed
    of draws that have none, and the highest rank of an adapter (None: any).

    ``why_general``: the reason for which transformers' own code computes everything; "" where it does not.
    """

    vocabulary: int
    ending: frozenset[int]
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_lora_rank: int | None = None
    why_general: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt that has been checked, with all that its answers need."""

    id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    lora_request: LoRARequest | None = None
    version: AdapterVersion | None = None
    room: int = 1


@dataclass(frozen=True, slots=True)
class _Abort:
    id: str


@dataclass(frozen=True, slots=True)
class _Forget:
    name: str


@dataclass(eq=False, slots=True)
class _Group:
    """The answers to one prompt."""

    asked: Asked
    answers: list[Answer]
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Engine:
    """Answers requests, which any thread may `submit` and `abort`; one thread steps.

    Where a request goes wrong, it ends with the finish reason "error" and its reason; the others go on.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: Any, settings: EngineSettings) -> None:
        self.runner, self.scheduler, self.pool = runner, scheduler, scheduler.pool
        self.tokenizer, self.settings = tokenizer, settings
        self.versions = Versions(settings.max_lora_rank)
        self.forms = Forms(tokenizer, settings.vocabulary, sorted(settings.ending))
        self._inbox: Inbox[Asked | _Abort | _Forget] = Inbox()
        self._groups: dict[str, _Group] = {}
        self._touched: dict[str, _Group] = {}  # of which something is to be told
        self._answers: dict[str, tuple[_Group, Answer]] = {}
        self._numbers, self._keys = itertools.count(), itertools.count()
        self._adapters: dict[str, LoRARequest] = {}

    @property
    def has_work(self) -> bool:
        """True where a step would do something."""
        return self.scheduler.has_work or bool(self._touched) or self._inbox.wait(0)

    def wait(self, seconds: float | None = None) -> bool:
        """Sleep until something is asked, at most so long; False where nothing was."""
        return self._inbox.wait(seconds)

    def asked(
        self,
        prompt: str | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
    ) -> Asked:
        """A request, checked: whatever is wrong with it that can be seen before it runs is raised here.

        Raises ConfigError, and FormatError for a folder that holds no adapter.
        """
        params = replace(params)  # checks it again, and keeps later changes out
        version = None if lora_request is None else self.versions.of(lora_request)
        room = self.scheduler.require_room(len(prompt_ids), version.n_front if version else 0)
        self._require_ids("the prompt", prompt_ids)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._require_ids(name, getattr(params, name) or ())
        if params.structured_outputs is not None:
            self.forms.form(params.structured_outputs)  # so that what cannot be compiled is told at once
        return Asked(
            id=str(next(self._numbers)),
            prompt=prompt, prompt_ids=tuple(prompt_ids), params=params, lora_request=lora_request, version=version,
            room=room,
        )  # fmt: skip

    def submit(self, asked: Asked) -> None:
        """Take a request in with the next step. From any thread."""
        self._inbox.put(asked)

    def abort(self, request_id: str) -> None:
        """End a request with the next step; one that is not there is none to end. From any thread."""
        self._inbox.put(_Abort(request_id))

    def forget(self, name: str) -> None:
        """Drop an adapter's name with the next step, where there is one of it. From any thread."""
        self._inbox.put(_Forget(name))

    def drop(self, request_ids: Sequence[str]) -> None:
        """End requests now, of which nothing is told any more. Between steps."""
        for message in self._inbox.drain():
            self._take_in(message)
        for id in request_ids:
            self._take_in(_Abort(id))
            if id in self._groups:
                self._forget(self._groups[id])
            self._touched.pop(id, None)

    def step(self) -> list[RequestOutput]:
        """Compute one batch; what is new of the requests, each at most once."""
        for message in self._inbox.drain():
            self._take_in(message)
        self._load_one()
        plan = self.scheduler.plan()
        if plan.sequences:
            self._commit(plan, self._run(plan))
        self._unload()
        touched, self._touched = self._touched, {}  # only now: a step that is interrupted leaves it to the next
        return [output for group in touched.values() if (output := self._output(group)) is not None]

    def add_adapter(self, request: LoRARequest) -> None:
        """Load an adapter now, and keep its name. Raises VeneerError where it does not fit. Between steps."""
        version = self.versions.of(request)
        self._bind(request, version)
        if not self.pool.is_resident(version.id):
            id, victim = self.pool.next_load([version.id])
            if id is None:
                self._adapters.pop(request.name)
                self.pool.forget(request.name)
                raise ConfigError(
                    f"adapter {request.name!r} finds no place: all {self.pool.n_resident} are in use or pinned"
                )
            try:
                self._load(id, victim)
            except VeneerError:
                self._forget_version(id)
                raise

    def remove_adapter(self, number: int) -> None:
        """Drop an adapter's name; its weights go when no request needs them. Raises AdapterNameError."""
        name = self._name_of(number)
        self._adapters.pop(name)
        self.pool.forget(name)
        self._unload()

    def pin_adapter(self, number: int) -> None:
        """Keep an adapter loaded. Raises AdapterNameError."""
        self.pool.pin(self._name_of(number))

    @property
    def adapters(self) -> list[LoRARequest]:
        """The adapters that are known by name."""
        return list(self._adapters.values())

    def _name_of(self, number: int) -> str:
        for name, request in self._adapters.items():
            if request.adapter_id == number:
                return name
        raise AdapterNameError(
            f"no adapter with the number {number}; known: { {r.adapter_id: n for n, r in self._adapters.items()} }"
        )

    def _require_ids(self, what: str, ids: Any) -> None:
        wrong = [
            i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.settings.vocabulary
        ]
        if wrong:
            raise ConfigError(
                f"{what} holds {wrong[:5]}, which are no token ids: those are 0 to {self.settings.vocabulary - 1}"
            )

    def _take_in(self, message: Asked | _Abort | _Forget) -> None:
        if isinstance(message, _Abort):
            group = self._groups.get(message.id)
            for answer in group.answers if group else ():
                self._end(answer.request, "abort")
            if group:
                self._touched[message.id] = group
            return
        if isinstance(message, _Forget):
            if self._adapters.pop(message.name, None) is not None:
                self.pool.forget(message.name)
            return
        if message.version is not None and message.lora_request is not None:
            self._bind(message.lora_request, message.version)
        self._begin(message)

    def _bind(self, request: LoRARequest, version: AdapterVersion) -> None:
        self.pool.bind(request.name, version)
        self._adapters[request.name] = request

    def _begin(self, asked: Asked) -> None:
        group = self._groups[asked.id] = _Group(asked, [])
        number = next(self._keys)
        for index in range(asked.params.n):
            request = self._request(asked, index)
            answer = Answer(request, index, asked.params, self.tokenizer)
            group.answers.append(answer)
            self._answers[request.id] = (group, answer)
            self.runner.begin(request.id, self._draw_rule(asked, request, (number, index)))
            self.scheduler.add(request)

    def _request(self, asked: Asked, index: int) -> Request:
        params = asked.params
        rule = StopRule(
            max_tokens=min(params.max_tokens or asked.room, asked.room),
            min_tokens=params.min_tokens,
            eos_ids=frozenset() if params.ignore_eos else self.settings.ending,
            stop_ids=frozenset(params.stop_token_ids or ()),
        )
        return Request(
            id=f"{asked.id}#{index}", prompt=asked.prompt_ids, rule=rule,
            version=asked.version.id if asked.version else None, n_front=asked.version.n_front if asked.version else 0,
            scores_prompt=params.prompt_logprobs is not None and index == 0,
        )  # fmt: skip

    def _draw_rule(self, asked: Asked, request: Request, number: tuple[int, int]) -> DrawRule:
        params = asked.params
        key = (
            (self.settings.seed, (number[0] << 32) + number[1] + 1)
            if params.seed is None
            else (params.seed, -number[1])
        )
        words = [variant for word in params.bad_words or () for variant in self._word_ids(word)]
        form = None if params.structured_outputs is None else self.forms.form(params.structured_outputs)
        return DrawRule(
            params=params, prompt=asked.prompt_ids, key=key, ending=self.settings.ending | request.rule.stop_ids,
            bad_words=tuple(words), form=form,
        )  # fmt: skip

    def _word_ids(self, word: str) -> list[tuple[int, ...]]:
        """The ids of a word at the start of a text and behind a space."""
        found = [
            tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word.lstrip()}")
        ]
        return [ids for ids in dict.fromkeys(found) if ids]

    def _load_one(self) -> None:
        """Load the adapter that the oldest waiting request lacks; everybody waits for it in this runner."""
        id, victim = self.pool.next_load(self.scheduler.wanted())
        if id is None:
            return
        try:
            self._load(id, victim)
        except VeneerError as error:
            for request in self.scheduler.fail(id, error):
                group, _ = self._answers[request.id]
                self._touched[group.asked.id] = group
            self._forget_version(id)

    def _forget_version(self, id: str) -> None:
        """Drop all names of a version that cannot be loaded."""
        for name in [n for n, version in self.pool.names.items() if version.id == id]:
            self._adapters.pop(name, None)
        self.pool.failed(id)

    def _load(self, id: str, victim: str | None) -> None:
        start = time.perf_counter()
        version = self.pool.version(id)
        self.versions.require_unchanged(version)
        if victim is not None:
            self.runner.unload(victim)
            self.pool.unloaded(victim)
        self.runner.load(id, Path(version.folder))
        self.pool.loaded(id)
        _LOG.info("%s (%s) loaded in %.0f ms", version.folder, version.kind, 1e3 * (time.perf_counter() - start))

    def _unload(self) -> None:
        for id in self.pool.unneeded():
            self.runner.unload(id)
            self.pool.unloaded(id)
        self.pool.tidy()

    def _run(self, plan: Plan) -> Sampled:
        try:
            return self.runner.run(plan)
        except VeneerError as error:
            return Sampled(failed={sequence.request_id: error for sequence in plan.sequences})

    def _commit(self, plan: Plan, sampled: Sampled) -> None:
        for request in self.scheduler.commit(plan, sampled):
            group, answer = self._answers[request.id]
            self._touched[group.asked.id] = group
            scored = sampled.prompt_logprobs.get(request.id)
            if scored is not None:
                group.prompt_logprobs = group.prompt_logprobs or [None]
                group.prompt_logprobs += [decoded(each, self.tokenizer) for each in scored]
            drawn = sampled.drawn.get(request.id)
            if drawn is not None:
                self.runner.take(request.id, drawn.token)
                if answer.take(drawn):
                    self._end(request, "stop")

    def _end(self, request: Request, reason: Any) -> None:
        if request.status is not Status.DONE:
            self.scheduler.end(request, reason)
        elif reason == "stop":  # its length, or a token, ended it at the same time: the string came first
            request.finish_reason, request.stop_token = "stop", None

    def _output(self, group: _Group) -> RequestOutput | None:
        asked, kind = group.asked, group.asked.params.output_kind
        finished = all(answer.request.status is Status.DONE for answer in group.answers)
        if finished:
            self._forget(group)
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        shown = [answer.output(kind, asked.lora_request) for answer in group.answers]
        errors = [answer.request.error for answer in group.answers if answer.request.error is not None]
        outputs = [output for output in shown if output is not None]
        if not outputs:
            return None
        scores = group.prompt_logprobs
        if scores is None and asked.params.prompt_logprobs is not None and len(asked.prompt_ids) == 1:
            scores = [None]
        return RequestOutput(
            request_id=asked.id, prompt=asked.prompt, prompt_token_ids=list(asked.prompt_ids), prompt_logprobs=scores,
            outputs=outputs, finished=finished, lora_request=asked.lora_request, error=errors[0] if errors else None,
        )  # fmt: skip

    def _forget(self, group: _Group) -> None:
        self._groups.pop(group.asked.id, None)
        for answer in group.answers:
            self._answers.pop(answer.request.id, None)
            self.runner.end(answer.request.id)
