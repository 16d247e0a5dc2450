"""Runs over one base that learn from drawn answers, trained together.

Each is a trainer of its own, and one engine draws for all of them, in one batch. Training passes follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from veneer.contract import MethodConfig
from veneer.data.chat import with_template
from veneer.learn.grpo import GRPOTrainer
from veneer.learn.policy import rollouts_of_members
from veneer.learn.rloo import RLOOTrainer
from veneer.learn.rollouts import Requests, Rollouts
from veneer.recipe.adapter import FROM
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import RequestOutput
from veneer.store.source import load_tokenizer
from veneer.train.base_model import device_of, load_base
from veneer.train.interrupt import Stop
from veneer.train.preference.trainer import without_old_names
from veneer.train.record.record import reason_of, record_of
from veneer.train.run import Tell
from veneer.train.run_trainer import RunTrainer
from veneer.train.sweep.coroutines import Coroutine, ask
from veneer.train.sweep.together import Job, JobEnd, run_job, told_end


@dataclass(frozen=True, slots=True)
class RolloutsRequest:
    """Request of a member for rollouts with the adapters of its model, which shares the base's weights."""

    model: PreTrainedModel


@dataclass(frozen=True, slots=True)
class AnswersRequest:
    """Request of a member for the answers of one draw."""

    asked: Sequence[CheckedRequest]


class MemberRollouts(Rollouts):
    """Rollouts of one member, by the engine that draws for all of them.

    The adapter of the member's model has the member's ``name`` and ``number`` in the engine.
    """

    def __init__(self, shared: Rollouts, model: PreTrainedModel, name: str, number: int) -> None:
        self.model, self._shared, self._name, self._number = model, shared, name, number
        self.engine, self._live = shared.engine, {}

    def close(self) -> None:
        """Drop the member's adapter, with its pages."""
        if any(each.adapter_id == self._number for each in self.engine.adapters):
            self.engine.remove_adapter(self._number)

    def run(self, asked: Sequence[CheckedRequest]) -> dict[str, RequestOutput]:
        """Return the outputs of requests by id. In a training step, all members' requests are answered in one batch.

        Outside of a training step the member's requests are answered alone, as by `Rollouts.run`.
        """
        if not self.model.training:
            return super().run(asked)
        outputs: dict[str, RequestOutput] = ask(AnswersRequest(asked))
        return outputs

    @contextmanager
    def requests(self) -> Iterator[Requests]:
        """Enter the context of `Rollouts.requests`, with the engine of all members."""
        with self._shared.requests() as requests:
            yield requests

    def _named(self, adapter: str) -> tuple[str, int]:
        return self._name, self._number

    def _settle(self) -> None:
        """Do nothing: members share one process, which does not move the base's tensors."""


class _Member:
    """Mixin for a trainer that draws by the engine of all members."""

    rollouts_of_base: Rollouts | None

    def take_base(
        self, base: PreTrainedModel, args: Any, processing_class: Any, peft_config: MethodConfig | None
    ) -> None:
        self.rollouts_of_base = ask(RolloutsRequest(base))


class _GRPOMember(_Member, GRPOTrainer):
    """Member of a sweep of GRPO."""


class _RLOOMember(_Member, RLOOTrainer):
    """Member of a sweep of RLOO."""


_KINDS: Mapping[str, type[GRPOTrainer | RLOOTrainer]] = {"grpo": _GRPOMember, "rloo": _RLOOMember}


class DrawnTogether:
    """Members that run in turns from draw to draw, and the engine that they share (None: each draws alone)."""

    def __init__(self, base: PreTrainedModel, rollouts: Rollouts | None, stop: Stop) -> None:
        self._base, self._rollouts, self._stop = base, rollouts, stop
        self._runs: dict[int, Coroutine[JobEnd]] = {}
        self._drawing: dict[int, MemberRollouts] = {}

    def start(self, job: Job) -> None:
        """Start a member: make its trainer, with random numbers of its own."""
        number, kind = len(self._runs) + 1, _KINDS[job.member.recipe.task]
        run: Coroutine[JobEnd] = Coroutine(lambda: _run_member(job, self._base, kind, self._stop))
        self._runs[number] = run
        asked: RolloutsRequest = run.resume()
        if self._rollouts is not None:
            self._drawing[number] = MemberRollouts(self._rollouts, asked.model, f"member{number}", number)
        run.resume(self._drawing.get(number))

    def train(self, tell: Tell) -> list[JobEnd]:
        """Train all members to the ends of their jobs, and return these in the order of the starts."""
        ended: dict[int, JobEnd] = {}
        answers: Mapping[str, RequestOutput] = {}
        while self._runs:
            asked: list[AnswersRequest] = []
            for number, run in [*self._runs.items()]:
                question = run.resume(answers)
                if run.ended:
                    ended[number] = question
                    self._remove(number)
                    tell(told_end(question))
                else:
                    asked.append(question)
            if asked and self._rollouts is not None:
                answers = self._rollouts.run([*chain.from_iterable(each.asked for each in asked)])
        return [ended[number] for number in sorted(ended)]

    def _remove(self, number: int) -> None:
        del self._runs[number]
        if number in self._drawing:
            self._drawing.pop(number).close()

    def close(self) -> None:
        """Stop all members where they are, without a result."""
        for run in self._runs.values():
            run.close()


def _run_member(job: Job, base: PreTrainedModel, kind: type[RunTrainer], stop: Stop) -> JobEnd:
    """Run a member as `run_job` does. An error that ends its training is kept in its record alone.

    The member's own rewards, tools and environments may raise any error, and the other members train on. Raises the
    error of a member that is refused before it trains.
    """
    try:
        return run_job(job, base, kind, stop)
    except Exception as error:
        record = record_of(Path(job.member.recipe.output))
        if record is None or record.get("reason") != reason_of(error):
            raise
        return JobEnd(record)


def draw_together(jobs: Sequence[Job], tell: Tell, stop: Stop) -> list[JobEnd]:
    """Train members of GRPO or RLOO over one base, as `train_together` does, with one engine for their draws.

    A member whose training fails ends with the status ``failed``; the others train on.
    """
    recipes = [job.member.recipe for job in jobs]
    first, args = recipes[0], recipes[0].training_config()
    base = cast(PreTrainedModel, load_base(first.model, device=device_of(args)).to(args.device))
    tokenizer = with_template(
        load_tokenizer(first.model.source), first.data.chat_template, first.data.response_template
    )
    configs = [None if FROM in each.adapter else each.adapter_config() for each in recipes]
    settings = [each.training_config() for each in recipes]
    rollouts = rollouts_of_members(base, tokenizer, [*zip(settings, configs, strict=True)])
    together = DrawnTogether(base, rollouts, stop)
    with without_old_names(), stop.deferred():  # members' own such blocks end in another order than they begin
        try:
            for job in jobs:
                together.start(job)
            tell(f"{len(jobs)} members draw together: {', '.join(job.member.name for job in jobs)}")
            return together.train(tell)
        finally:
            together.close()
