"""Trains several runs over one base together.

Each run has its own trainer. Their forward and backward passes are computed at once, each row of a batch with its run's
adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.errors import ConfigError, DivergedError, Interrupted, Paused
from veneer.model.fused.decoder import fused
from veneer.train.base_model import device_of, load_base
from veneer.train.interrupt import Stop
from veneer.train.loss import Scoring, TokenLoss
from veneer.train.recipe_trainer import make_trainer
from veneer.train.record.going_on import GoingOn
from veneer.train.record.record import record_of
from veneer.train.run import Tell, carry_out
from veneer.train.run_trainer import RunTrainer
from veneer.train.show.display import RunDisplay
from veneer.train.sweep.coroutines import Coroutine, ask
from veneer.train.sweep.pause import PauseAtRung
from veneer.train.sweep.recipe import Member
from veneer.train.sweep.shared_base import Part, SharedBase, twin
from veneer.train.trainer import SFTTrainer
from veneer.train.undone import unwrap_forward


@dataclass(frozen=True, slots=True)
class LossRequest:
    """A member's request for the loss of its micro-batch."""

    inputs: dict[str, Tensor]
    scoring: Scoring


@dataclass(frozen=True, slots=True)
class Backward:
    """A member's request for the gradients of its parameters, given the gradient of its loss."""

    grad: Tensor


@dataclass(frozen=True, slots=True)
class Job:
    """Part of a member's run that is trained in one go. ``going_on``: the earlier run that it resumes, if any.

    It pauses after 1/``divisor`` of the run's steps; if that is None, it trains to the end.
    """

    member: Member
    going_on: GoingOn | None
    divisor: int | None = None


@dataclass(frozen=True, slots=True)
class JobEnd:
    """End of a job: the content of ``run.json``, and the loss if the run is paused, else None."""

    record: dict[str, Any]
    loss: float | None = None


class MemberTrainer(SFTTrainer):
    """Trainer that requests loss and gradients of each micro-batch from the sweep instead of computing them."""

    _shared: TokenLoss | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        scoring = Scoring(self.args.label_smoothing_factor, self.args.loss_type == "dft")
        counted: TokenLoss = ask(LossRequest(inputs, scoring))
        self._shared = counted
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._shared = None
        ask(Backward(cast(Tensor, counted.total.grad)))
        return loss

    def token_loss(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
        return super().token_loss(model, inputs) if self._shared is None else self._shared


class Together:
    """Runs that take turns, and the base that they share."""

    def __init__(self, base: PreTrainedModel, tell: Tell, stop: Stop) -> None:
        self.base, self.tell, self.stop = base, tell, stop
        self.runs: dict[str, Coroutine[JobEnd]] = {}
        self.trainers: dict[str, MemberTrainer] = {}
        self.titles: dict[str, str] = {}  # which need not be names of adapters
        self.ended: dict[str, JobEnd] = {}

    def start(self, name: str, job: Job) -> None:
        """Start a member: its coroutine runs until it has created its trainer, with the member's own random numbers."""
        run: Coroutine[JobEnd] = Coroutine(lambda: run_job(job, self.base, MemberTrainer, self.stop))
        self.runs[name], self.trainers[name] = run, run.resume()
        self.titles[name] = job.member.name
        if self.trainers[name].aux_loss_enabled:
            raise ConfigError(
                f"{job.member.name}: the loss of a router is one number for a whole batch, but members of a sweep "
                "share batches: train this member alone"
            )

    def train(self) -> None:
        """Train all members to the ends of their jobs."""
        args = next(iter(self.trainers.values())).args
        accelerator = next(iter(self.trainers.values())).accelerator
        shared = SharedBase(self.base)
        with ExitStack() as stack:
            stack.callback(self._close)
            for name, trainer in self.trainers.items():
                shared.add(name, cast(PeftModel, trainer.model), self.titles[name])
            if args.gradient_checkpointing:
                shared.checkpoint(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
            stack.enter_context(fused(cast(PreTrainedModel, shared.model)) if args.fused == "auto" else nullcontext())
            accelerator.prepare_model(shared.model, evaluation_mode=True)
            stack.callback(unwrap_forward, shared.model)
            self._in_step(shared)

    def _close(self) -> None:
        for run in self.runs.values():
            run.close()

    def _in_step(self, shared: SharedBase) -> None:
        """Train all members together: compute one micro-batch of each in one pass, and repeat until all have ended."""
        asked = self._resume(shared, dict.fromkeys(self.runs))
        while asked:
            totals, answers = self._losses(shared, asked)
            asked = self._resume(shared, answers)
            grads = {name: question.grad for name, question in asked.items()}
            if grads:
                torch.autograd.backward([totals[name] for name in grads], list(grads.values()))
            del totals
            asked = self._resume(shared, dict.fromkeys(asked))

    def _losses(
        self, shared: SharedBase, asked: Mapping[str, LossRequest]
    ) -> tuple[dict[str, Tensor], dict[str, TokenLoss]]:
        """Return the total losses of the members by name, and the losses to pass to the members, which are detached.

        A member's own backward pass ends at its detached loss and sets that loss's gradient. The backward pass through
        the base starts from the total losses, with these gradients.
        """
        parts = {}
        for name, question in asked.items():
            generator = self.runs[name].state.generator()
            parts[name] = Part(question.inputs, question.scoring, generator)
        found = shared.losses(parts)
        for name, part in parts.items():
            run = self.runs[name]
            run.state = run.state.after(part.generator)
        leaves = {n: replace(loss, total=loss.total.detach().requires_grad_()) for n, loss in found.items()}
        return {name: loss.total for name, loss in found.items()}, leaves

    def _resume(self, shared: SharedBase, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Resume each member's coroutine with its entry of ``answers``, and return what each one requests next. Members
        that have ended are removed.
        """
        asked = {}
        for name, answer in answers.items():
            question = self.runs[name].resume(answer)
            if self.runs[name].ended:
                self.ended[name] = question
                shared.remove(name)
                del self.runs[name]
                self.tell(told_end(question))
            else:
                asked[name] = question
        return asked


def train_together(jobs: Sequence[Job], tell: Tell, stop: Stop) -> list[JobEnd]:
    """Train members over one base, and return how each ended, in their order.

    A member whose loss is not finite ends; the others train on. After a signal, all end after their current step.
    """
    first = jobs[0].member.recipe
    args = first.training_config()
    together = Together(load_base(first.model, device=device_of(args)).to(args.device), tell, stop)
    for index, job in enumerate(jobs):
        together.start(f"member{index}", job)
    tell(f"{len(jobs)} members train together: {', '.join(job.member.name for job in jobs)}")
    with stop.deferred():
        together.train()
    return [together.ended[f"member{index}"] for index in range(len(jobs))]


def told(ended: JobEnd) -> str:
    """Describe how a member's job ended, in a few words."""
    record = ended.record
    if ended.loss is not None:
        return f"waits after step {record['step']}, loss {ended.loss:.4f}"
    if record["status"] == "interrupted":
        return f"interrupted after step {record['step']}"
    if record["status"] == "diverged":
        return f"diverged ({record['reason'].partition(':')[0]})"
    if record["status"] == "failed":
        return f"failed after step {record['step']}: {record['reason']}"
    results = record["results"]
    quality = (
        f"held-out loss {results['eval_loss']:.4f}" if "eval_loss" in results else f"loss {results['train_loss']:.4f}"
    )
    if (reward := reward_of(record)) is not None:
        quality = f"reward {reward:.4f}" if "eval_reward" not in results else f"held-out reward {reward:.4f}"
    status = "stopped early" if results.get("stopped_early") else record["status"]
    return f"{status} after {results['steps']} steps, {quality}"


def reward_of(record: Mapping[str, Any]) -> float | None:
    """Return the mean reward of a run, held out if it has held-out rows, else of its last log line; None without
    rewards.
    """
    lines = [line for line in record.get("log", ()) if "reward" in line]
    told: float | None = record.get("results", {}).get("eval_reward", lines[-1]["reward"] if lines else None)
    return told


def told_end(ended: JobEnd) -> str:
    """Return a line with a member's name and how its job ended."""
    return f"{Path(ended.record['recipe']['output']).name}: {told(ended)}"


def run_job(job: Job, base: PreTrainedModel, kind: type[RunTrainer], stop: Stop) -> JobEnd:
    """Run one member up to the end of its job, as a coroutine.

    The first request is the member's trainer, of this ``kind``. The sweep starts the training by resuming the
    coroutine.
    """
    recipe, output = job.member.recipe, Path(job.member.recipe.output)
    trainer = make_trainer(recipe, twin(base), kind)
    trainer.remove_callback(RunDisplay)
    trainer.add_callback(RunDisplay(lambda: trainer.n_tokens_read, bar=False, name=job.member.name))
    if job.divisor is not None:
        trainer.add_callback(PauseAtRung(trainer, job.divisor))
    ask(trainer)
    loss = None
    try:
        return JobEnd(carry_out(recipe, trainer, going_on=job.going_on, stop=stop))
    except Paused as pause:
        loss = pause.loss
    except (DivergedError, Interrupted):
        pass
    return JobEnd(cast("dict[str, Any]", record_of(output)), loss)  # where it is written down
