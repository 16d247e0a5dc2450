"""Loop of serving: accept requests, plan, run, commit, and return the outputs."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from veneer.errors import AdapterNameError, ConfigError, VeneerError
from veneer.plain.lru import LruCache
from veneer.serve.adapters.loader import Finished, Loader
from veneer.serve.adapters.versions import Versions
from veneer.serve.gc_freeze import GcFreeze
from veneer.serve.inbox import Abort, Act, Forget, Inbox
from veneer.serve.metrics import MetricSeries
from veneer.serve.requests.admission import Admission
from veneer.serve.requests.answer import Answer, decoded
from veneer.serve.requests.answer_group import AnswerGroup
from veneer.serve.requests.checked import (
    CheckedRequest,
    EngineSettings,
    Rules,
    require_answerable,
    require_client,
)
from veneer.serve.requests.pooling import Pooling
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.requests.readers import Readers
from veneer.serve.runners.runner import Runner, read_version
from veneer.serve.sandbox.sandbox import Sandbox
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.outputs import RequestOutput
from veneer.serve.schedule.preloads import Preload, Preloads
from veneer.serve.schedule.request import Request, Status
from veneer.serve.schedule.sampling_params import SamplingParams
from veneer.serve.schedule.scheduler import Scheduler
from veneer.serve.schedule.step_plan import Sampled, StepPlan
from veneer.serve.stats import Stats
from veneer.store.named_base import GivenBase

_LOG = logging.getLogger(__name__)
_DROPPED = 1 << 16  # names that were dropped and are remembered, for requests on their way
_Message = CheckedRequest | Abort | Forget | Act | Preload | Finished[Any]
Result = TypeVar("Result")


class Engine:
    """Engine that answers requests. Any thread may `submit` and `abort`; one thread steps.

    If a request fails, it ends with the finish reason "error" and its error; the others continue. Adapters are read on
    their own thread, concurrently with the steps.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: Any, settings: EngineSettings) -> None:
        self.runner, self.scheduler, self.pool = runner, scheduler, scheduler.pool
        scheduler.sharing.is_apart = runner.keeps_apart
        self.tokenizer, self.settings = tokenizer, settings
        self.readers = Readers(PromptReader(tokenizer, scheduler.limits.max_model_len), settings.chat_template)
        served = GivenBase("".join(settings.base_names[:1]), settings.base_names[1:], settings.base)
        self.versions = Versions(settings.max_lora_rank, settings.value_bytes, settings.base, served)
        self.backlog = Admission(scheduler.limits, scheduler.waiting)
        self._rules = Rules(tokenizer, settings)
        self._stats = Stats() if settings.keeps_stats else None
        self.collector = GcFreeze()
        self._inbox: Inbox[_Message] = Inbox()
        self._loader: Loader[Any] = Loader(self._inbox.put)
        self._waits_for_load = False
        self._failures: dict[str, VeneerError] = {}  # of the loads that ended last
        self._groups: dict[str, AnswerGroup] = {}
        self._touched: dict[str, AnswerGroup] = {}  # of which something is to be told
        self._answers: dict[str, tuple[AnswerGroup, Answer]] = {}
        self._n_ended = 0  # answers, since the last step
        self._numbers, self._keys = itertools.count(), itertools.count()
        self._adapters: dict[str, LoRARequest] = {}
        self._dropped: LruCache[str, int] = LruCache(_DROPPED)  # numbers of requests by names that were dropped
        self._preloads = Preloads(self.pool, self._adapters, self._dropped)

    @property
    def has_work(self) -> bool:
        """Return True if a step has work now; False also if all requests wait for an adapter that is being read."""
        stepping = self.scheduler.has_work and not self._waits_for_load
        return stepping or bool(self._touched) or self._inbox.wait(0)

    def wait(self, seconds: float | None = None) -> bool:
        """Block until a request or a read adapter arrives, for at most ``seconds``. Return False if neither came."""
        return self._inbox.wait(seconds)

    def prepare_forms(self) -> None:
        """Prepare for structured answers now, so that the first is as fast as later ones. Any thread may call it."""
        self._rules.forms.prepare()

    def confine(self, templates: Sandbox, grammars: Sandbox) -> None:
        """Run other people's chat templates and grammars in processes of their own."""
        self.readers.base.rendering.sandbox, self._rules.forms.sandbox = templates, grammars

    def close(self) -> None:
        """Begin no more reads, and wait for the current one and for writes to disk. No step may follow."""
        self._loader.stop()

    def asked(
        self,
        prompt: str | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
        *,
        client: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> CheckedRequest:
        """Return a checked request; any error that is visible before it runs is raised here.

        Without a ``client`` the adapter is the client. Clients receive tokens in proportion to ``weight``. The request
        shares pages only with requests of the same ``cache_salt``. Raises ConfigError, and FormatError for a folder
        that holds no adapter.
        """
        params = replace(params)  # checks it again, and keeps later changes out
        require_client(client, priority)
        self.backlog.require_possible(params.n, len(prompt_ids))
        version = None if lora_request is None else self.versions.of(lora_request)
        n_front, n_bytes = (version.n_front, version.n_bytes) if version else (0, 0)
        if version and self.pool.is_pinned(version.id):
            n_bytes = 0  # counted among the pinned ones
        room = self.scheduler.require_room(len(prompt_ids), n_front, n_bytes)
        reader = self.readers.of(lora_request)
        constraints = self._rules.constraints(prompt_ids, params, cache_salt, reader)
        return CheckedRequest(
            id=str(next(self._numbers)),
            prompt=prompt, prompt_ids=tuple(prompt_ids), params=params, reader=reader, constraints=constraints,
            lora_request=lora_request, version=version, room=room, priority=priority, cache_salt=cache_salt,
            weight=weight,
            client=("adapter", lora_request.name if lora_request else "") if client is None else ("client", client),
        )  # fmt: skip

    def submit(self, asked: CheckedRequest) -> None:
        """Accept a request, which the next step sees. May be called from any thread.

        Raises QueueFullError if too many requests wait, and the errors of `require_answerable`.
        """
        require_answerable(asked, self.settings)
        self.backlog.submit(asked)
        self._inbox.put(asked)

    def metrics(self) -> list[MetricSeries]:
        """Return counts and times since the start, in vLLM's names. Raises ConfigError if the engine keeps no
        statistics.
        """
        if self._stats is None:
            raise ConfigError("disable_log_stats=True keeps no metrics: start with disable_log_stats=False")
        return self._stats.metrics(self.scheduler, self.backlog.n_refused)

    def abort(self, request_id: str) -> None:
        """End a request at the next step; an unknown one is ignored. May be called from any thread."""
        self._inbox.put(Abort(request_id))

    def n_drawn(self, request_id: str) -> int:
        """Return the number of tokens of a request's answers so far; 0 for an unknown one. From any thread."""
        group = self._groups.get(request_id)
        return 0 if group is None else sum(len(answer.request.output) for answer in group.answers)

    def forget(self, name: str, up_to: int = 0) -> None:
        """Drop an adapter's name at the next step, if the name is known. From any thread.

        Requests for the adapter that have been submitted are answered. Those numbered up to ``up_to`` do not register
        the name again.
        """
        self._inbox.put(Forget(name, up_to))

    def preload(self, request: LoRARequest, *, pins: bool = False) -> Future[None]:
        """Load an adapter while steps continue; return a future that completes when it is loaded. From any thread.

        Its name then refers to it. If ``pins``, it is pinned. Raises the errors of `Versions.of`; the future raises if
        the adapter cannot be loaded.
        """
        preload = Preload(request, self.versions.of(request), pins)
        self._inbox.put(preload)
        return preload.told

    def between_steps(self, act: Callable[[], Result]) -> Future[Result]:
        """Call a function on the thread that steps; return a future of its result. From any thread.

        If the function raises a VeneerError, the future raises it.
        """
        told: Future[Result] = Future()
        self._inbox.put(Act(act, told))
        return told

    def drop(self, request_ids: Sequence[str]) -> None:
        """End requests now, without further outputs. Call it between steps."""
        self._take_all()
        for id in request_ids:
            self._take_in(Abort(id))
            if id in self._groups:
                self._forget(self._groups[id])
            self._touched.pop(id, None)

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Return the new outputs, at most one for each request."""
        self._take_all()
        self._begin_loads()
        self._end_barred()
        plan = self.scheduler.plan()
        if self._stats is not None:
            self._stats.admit(self.scheduler.admitted)
        self._make_way()
        if plan.sequences:
            with self.scheduler.once(plan):
                self._commit(plan, self._run(plan))
        elif (stuck := self.scheduler.stuck()) is not None:
            self._end_stuck(stuck)
        if self._preloads and not self.scheduler.has_work:  # nothing is going on that could make a place
            self._begin_loads()
            if not self.pool.loading:
                self._preloads.give_up()
        self._waits_for_load = not plan.sequences and bool(self.pool.loading)
        self._unload()
        touched, self._touched = self._touched, {}  # only now: a step that is interrupted leaves it to the next
        outputs = [output for group in touched.values() if (output := self._output(group)) is not None]
        self.backlog.rate.note(self._n_ended, self.scheduler.has_work)
        self._n_ended = 0
        return outputs

    def add_adapter(self, request: LoRARequest) -> None:
        """Load an adapter now, and register its name. Raises VeneerError if it does not fit. Call it between steps."""
        version = self.versions.of(request)
        self._bind(request, version)
        while not self.pool.is_resident(version.id):
            began = self.pool.is_absent(version.id) and self._load(self.pool.begin_load([version.id]))
            if not began and not self.pool.loading:
                self._forget_names(version.id)
                raise ConfigError(f"cannot load adapter {request.name!r}: {self.pool.told_places()}")
            self._inbox.wait()
            self._take_all()
            if not self.pool.is_known(version.id):
                raise self._failures.pop(
                    version.id, AdapterNameError(f"adapter {request.name!r} was removed while it was being loaded")
                )

    def take(self, request: LoRARequest, adapter: Any) -> None:
        """Load an adapter that the runner has packed, and pin it under the name of ``request``. Between steps.

        ``request`` gives its version. Raises ConfigError if there is no room.
        """
        version = self.versions.of(request)
        self._bind(request, version)
        self.pool.pin(request.name)
        if not self.pool.is_absent(version.id):
            return
        if self.pool.begin_load([version.id]) is None:
            self._forget_names(version.id)
            raise ConfigError(f"cannot load adapter {request.name!r}: {self.pool.told_places()}")
        self._end_load(Finished(version.id, adapter, 0.0))
        if version.id in self._failures:
            raise self._failures.pop(version.id)
        self._unload()

    def remove_adapter(self, number: int) -> None:
        """Drop the name of the adapter with this number. Its weights are freed when no request needs them.

        Raises AdapterNameError for an unknown number.
        """
        name = self._name_of(number)
        self._adapters.pop(name)
        self.pool.forget(name)
        self._unload()

    def pin_adapter(self, number: int) -> None:
        """Keep the adapter with this number loaded. Raises AdapterNameError for an unknown number."""
        self.pool.pin(self._name_of(number))

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values; running requests keep theirs. Call it between steps."""
        self.scheduler.pages.reset()

    @property
    def adapters(self) -> list[LoRARequest]:
        """Adapters that are known by name."""
        return list(self._adapters.values())

    def _name_of(self, number: int) -> str:
        for name, request in self._adapters.items():
            if request.adapter_id == number:
                return name
        raise AdapterNameError(
            f"no adapter with the number {number}; known: { {r.adapter_id: n for n, r in self._adapters.items()} }"
        )

    def _take_all(self) -> None:
        """Handle all messages of other threads. If this is interrupted, the next step handles the rest."""
        self._failures.clear()
        while (message := self._inbox.take()) is not None:
            self._take_in(message)

    def _take_in(self, message: _Message) -> None:
        self._waits_for_load = False
        match message:
            case Finished():
                self._end_load(message)
            case Abort():
                group = self._groups.get(message.id)
                for answer in group.answers if group else ():
                    self._end(answer.request, "abort")
                if group:
                    self._touched[message.id] = group
            case Forget():
                self._dropped.put(message.name, message.up_to)
                if self._adapters.pop(message.name, None) is not None:
                    self.pool.forget(message.name)
            case Act():
                message.run()
            case Preload():
                self._preloads.add(message)
            case CheckedRequest():
                if message.version is not None and message.lora_request is not None:
                    is_dropped = message.lora_request.adapter_id <= (self._dropped.get(message.lora_request.name) or 0)
                    self.pool.know(message.version) if is_dropped else self._bind(message.lora_request, message.version)
                self._begin(message)

    def _bind(self, request: LoRARequest, version: AdapterVersion) -> None:
        self.pool.bind(request.name, version)
        self._adapters[request.name] = request

    def _begin(self, asked: CheckedRequest) -> None:
        pool = None if asked.pooling is None else Pooling(asked.pooling)
        group = self._groups[asked.id] = AnswerGroup(asked, [], list(asked.prompt_ids), pool=pool)
        number, adapter = next(self._keys), asked.lora_request
        count = None if adapter is None else self.pool.count(adapter.name)
        for index in range(asked.params.n):
            request = self._rules.request(asked, index)
            rule = self._rules.draw_rule(asked, request, (number, index))
            request.draft = self._rules.draft(rule)
            answer = Answer(request, index, asked.params, asked.reader.tokenizer)
            group.answers.append(answer)
            self._answers[request.id] = (group, answer)
            self.runner.begin(request.id, rule)
            if self._stats is not None:
                self._stats.begin(request, count)
            if count is not None and request.version is not None:
                count.n_hits += self.pool.is_resident(request.version)
            self.scheduler.add(request)
        self.backlog.arrive(asked)

    def _begin_loads(self) -> None:
        """Start loading the adapters that waiting requests need, in the order of the requests."""
        while self._load(self.scheduler.begin_load()) or self._load(self._preloads.begin_load()):
            pass

    def _end_barred(self) -> None:
        """End requests for adapters that can never be loaded, because pinned adapters hold all slots or too much
        memory.
        """
        self._preloads.give_up(barred=True)
        while (first := self.scheduler.waiting.absent()) is not None and first.version is not None:
            if not self.pool.is_barred(first.version):
                break
            for request in self.scheduler.fail(first.version, self._preloads.no_place()):
                self._touch(request)

    def _load(self, id: str | None) -> bool:
        """Queue the version ``id`` for the loader. Return False if ``id`` is None."""
        if id is not None:
            read = partial(read_version, self.runner, self.versions, self.pool.version(id), self._loader.later)
            self._loader.submit(id, read)
        return id is not None

    def _end_load(self, finished: Finished[Any]) -> None:
        """Hand a read adapter to the runner. If reading or loading failed, end the requests that wait for it."""
        id, result = finished.id, finished.result
        if not self.pool.is_needed(id):
            self.pool.abandoned(id)
            return
        try:
            if isinstance(result, BaseException):
                raise result
            start = time.perf_counter()
            if not self.pool.settle(id, result.n_bytes):
                return  # it takes more than was thought: its turn comes when there is room for that
            self._make_way()
            self.runner.load(id, result)
        except VeneerError as error:
            self._fail(id, error)
            return
        except BaseException:  # an interrupt, say: it is read again when somebody waits for it
            self.pool.going.append(id)
            self.pool.abandoned(id)
            raise
        self._preloads.end(id)
        self.pool.loaded(id, finished.seconds)
        self.collector.settle()
        version, taken = self.pool.version(id), time.perf_counter() - start
        _LOG.info(
            "%s (%s, %d bytes) read in %.0f ms, added to the engine in %.1f ms",
            version.told, version.kind, result.n_bytes, 1e3 * finished.seconds, 1e3 * taken,
        )  # fmt: skip

    def _fail(self, id: str, error: VeneerError) -> None:
        self._failures[id] = error
        self._preloads.end(id, error)
        for request in self.scheduler.fail(id, error):
            self._touch(request)
        self._forget_names(id)
        self.pool.failed(id)

    def _end_stuck(self, request: Request) -> None:
        error = ConfigError(
            f"there is no memory for the {request.n_front + request.n_tokens} positions of this request and its "
            f"adapter: {self.pool.told_places()}"
        )
        self.scheduler.end(request, "error", error)
        self._touch(request)

    def _touch(self, request: Request) -> None:
        group, _ = self._answers[request.id]
        self._touched[group.asked.id] = group

    def _forget_names(self, id: str) -> None:
        """Drop all names of a version that cannot be loaded."""
        for name in self.pool.names_of(id):
            self._adapters.pop(name, None)
            self.pool.forget(name)

    def _make_way(self) -> None:
        """Free the memory of evicted versions and pages."""
        while self.pool.going:
            self.runner.unload(self.pool.going[0])
            self.pool.going.popleft()
        pages = self.scheduler.pages
        (shed, left), pages.shed, pages.left = (pages.shed, pages.left), [], []
        if shed:
            self.runner.discard(shed)
        if left:
            self.runner.release(left)

    def _unload(self) -> None:
        self.pool.tidy()
        self._make_way()

    def _run(self, plan: StepPlan) -> Sampled:
        start = time.perf_counter()
        try:
            sampled = self.runner.run(plan)
        except VeneerError as error:
            return Sampled(failed={sequence.request_id: error for sequence in plan.sequences})
        n_decoding = sum(sequence.decodes for sequence in plan.sequences)
        n_read = sum(len(sequence.tokens) for sequence in plan.sequences if not sequence.decodes)
        pace, worth = self.scheduler.pace, self.scheduler.pages.worth
        if not any(sequence.n_drafted for sequence in plan.sequences):  # which would take longer than decoding does
            pace.observe(n_decoding, n_read, time.perf_counter() - start)
        worth.token_seconds = pace.row_seconds or worth.token_seconds
        return sampled

    def _commit(self, plan: StepPlan, sampled: Sampled) -> None:
        for request in self.scheduler.commit(plan, sampled):
            group, answer = self._answers[request.id]
            self._touch(request)
            scored = sampled.prompt_logprobs.get(request.id)
            if scored is not None:
                group.prompt_logprobs = group.prompt_logprobs or [None]
                group.prompt_logprobs += [decoded(each, group.asked.reader.tokenizer) for each in scored]
            if group.pool is not None and request.id in sampled.hidden:
                group.pool.add(sampled.hidden[request.id])
            drawn = sampled.drawn.get(request.id, [])
            for n, each in enumerate(drawn, start=1 + len(request.output) - len(drawn)):
                self.runner.take(request.id, each.token)
                if answer.take(each, n):
                    self._end(request, "stop")
                    del drawn[len(drawn) + n - len(request.output) :]  # what a draft has given behind the end
                    del request.output[n:]
                    break
        if self._stats is not None:
            self._stats.commit(plan, sampled)

    def _end(self, request: Request, reason: Any) -> None:
        if request.status is not Status.DONE:
            self.scheduler.end(request, reason)
        elif reason == "stop":  # its length, or a token, ended it at the same time: the string came first
            request.finish_reason, request.stop_token = "stop", None

    def _output(self, group: AnswerGroup) -> RequestOutput | None:
        metrics = None
        if group.is_done:
            metrics = None if self._stats is None else self._stats.of([answer.request for answer in group.answers])
            self._forget(group)
        return group.output(metrics)

    def _forget(self, group: AnswerGroup) -> None:
        self._groups.pop(group.asked.id, None)
        self._n_ended += len(group.answers)
        for answer in group.answers:
            self._answers.pop(answer.request.id, None)
            self.runner.end(answer.request.id)
            if self._stats is not None:
                self._stats.end(answer.request)
