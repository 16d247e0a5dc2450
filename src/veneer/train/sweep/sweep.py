"""Sweep: several runs over one base, trained together.

Each is a trainer of its own. Their forward and backward passes are computed at once, by routing the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.errors import ConfigError, DivergedError, Interrupted
from veneer.model.fused.decoder import fused
from veneer.train.base_model import load_base
from veneer.train.checkpoint import checkpoints
from veneer.train.going_on import GoingOn, changes_since, is_complete
from veneer.train.interrupt import Stop, listening
from veneer.train.loss import Scoring, TokenLoss
from veneer.train.output import Resume, continues, require_data_files, require_fresh
from veneer.train.processes import n_processes
from veneer.train.recipe_trainer import make_trainer
from veneer.train.record import record_of
from veneer.train.run import Tell, carry_out
from veneer.train.show.display import RunDisplay
from veneer.train.sweep.coroutines import Coroutine, ask
from veneer.train.sweep.recipe import Member, Sweep
from veneer.train.sweep.shared_base import Part, SharedBase, twin
from veneer.train.trainer import SFTTrainer
from veneer.train.undone import unwrap_forward


@dataclass(frozen=True, slots=True)
class Forward:
    """Request of a member for the loss of a micro-batch."""

    inputs: dict[str, Tensor]
    scoring: Scoring


@dataclass(frozen=True, slots=True)
class Backward:
    """Request of a member for the gradients of its parameters, given that of its loss."""

    grad: Tensor


class MemberTrainer(SFTTrainer):
    """Trainer that asks the sweep for the loss and the gradients of each of its micro-batches."""

    _shared: TokenLoss | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        scoring = Scoring(self.args.label_smoothing_factor, self.args.loss_type == "dft")
        counted: TokenLoss = ask(Forward(inputs, scoring))
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
    """Members that run in alternation, and the base that they share."""

    def __init__(self, base: PreTrainedModel, tell: Tell, stop: Stop) -> None:
        self.base, self.tell, self.stop = base, tell, stop
        self.runs: dict[str, Coroutine[dict[str, Any]]] = {}
        self.trainers: dict[str, MemberTrainer] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def start(self, name: str, member: Member, going_on: GoingOn | None) -> None:
        """Let a member make its trainer, with its own random numbers."""
        run = Coroutine(lambda: _run(member, self.base, going_on, self.stop))
        self.runs[name], self.trainers[name] = run, run.resume()

    def train(self) -> None:
        """Train all members to their ends."""
        args = next(iter(self.trainers.values())).args
        accelerator = next(iter(self.trainers.values())).accelerator
        shared = SharedBase(self.base)
        with ExitStack() as stack:
            stack.callback(self._close)
            for name, trainer in self.trainers.items():
                shared.add(name, cast(PeftModel, trainer.model))
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
        """One micro-batch of every member after the other, until the last has left."""
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
        self, shared: SharedBase, asked: Mapping[str, Forward]
    ) -> tuple[dict[str, Tensor], dict[str, TokenLoss]]:
        """The members' losses, and each as a leaf for the member to go on from."""
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
        """Give each member its answer, and take what it asks next; one that has ended leaves."""
        asked = {}
        for name, answer in answers.items():
            question = self.runs[name].resume(answer)
            if self.runs[name].ended:
                self.records[name] = question
                shared.remove(name)
                del self.runs[name]
                self.tell(f"{Path(question['recipe']['output']).name}: {told(question)}")
            else:
                asked[name] = question
        return asked


def run_sweep(
    sweep: Sweep, *, resume: Resume = False, allow_changes: bool = False, tell: Tell = lambda line: None
) -> list[dict[str, Any]]:
    """Train all members and return the content of each one's ``run.json``, in their order.

    Each member writes into a folder of its name the files of a run of its own. One whose loss is not finite leaves with
    the status ``diverged``. One that stops early or comes to its end leaves too; the others train on.

    With ``resume`` members that are over stay as they are, and the others continue from their last checkpoints.
    ``"auto"`` also begins a sweep. They keep the settings that they were begun with, unless ``allow_changes``. SIGTERM
    and SIGINT end each member after its step in progress, with a checkpoint, and raise Interrupted.

    Raises ConfigError if several processes were started, DataError if files of rows do not exist.
    """
    if n_processes() > 1:
        raise ConfigError("the members of a sweep share one process: start it with `veneer train`, without torchrun")
    for member in sweep.members:
        if not continues(Path(member.recipe.output), resume):
            require_data_files(member.recipe.data)
    records: dict[str, dict[str, Any]] = {}
    left: list[tuple[Member, GoingOn | None]] = []
    for member in sweep.members:
        before, going_on = _as_it_was(member, resume, allow_changes)
        if before is None:
            left.append((member, going_on))
        else:
            records[member.name] = before
            tell(f"{member.name}: {told(before)}, before")
    if left:
        with listening() as stop:
            first = left[0][0].recipe
            together = Together(load_base(first.model).to(first.training_config().device), tell, stop)
            for index, (member, going_on) in enumerate(left):
                together.start(f"member{index}", member, going_on)
            tell(f"{len(left)} members train together")
            with stop.deferred():
                together.train()
            records |= {member.name: together.records[f"member{i}"] for i, (member, _) in enumerate(left)}
            stop.check()
    return [records[member.name] for member in sweep.members]


def _as_it_was(member: Member, resume: Resume, allow_changes: bool) -> tuple[dict[str, Any] | None, GoingOn | None]:
    """The record of a member that is over; else None, and what it goes on from, if anything."""
    recipe, output = member.recipe, Path(member.recipe.output)
    require_fresh(output, resume)
    before = record_of(output) if resume else None
    found = changes_since(before, recipe, allow_changes) if before is not None else []
    if before is not None and (is_complete(before, recipe) or (before["status"] == "diverged" and not found)):
        return before, None
    return None, GoingOn(before, found, allow_changes) if resume and checkpoints(output) else None


def told(record: Mapping[str, Any]) -> str:
    """Return the end of a member's run, in a few words."""
    if record["status"] == "interrupted":
        return f"interrupted after step {record['step']}"
    if record["status"] == "diverged":
        return f"diverged ({record['reason'].partition(':')[0]})"
    results = record["results"]
    loss = (
        f"held-out loss {results['eval_loss']:.4f}" if "eval_loss" in results else f"loss {results['train_loss']:.4f}"
    )
    return f"{'stopped early' if results['stopped_early'] else 'finished'} after {results['steps']} steps, {loss}"


def _run(member: Member, base: PreTrainedModel, going_on: GoingOn | None, stop: Stop) -> dict[str, Any]:
    """The whole run of one member."""
    recipe, output = member.recipe, Path(member.recipe.output)
    trainer = cast(MemberTrainer, make_trainer(recipe, twin(base), MemberTrainer))
    if trainer.aux_loss_enabled:
        raise ConfigError(
            "the loss of a router is one number for a whole batch, and members share batches: train alone"
        )
    trainer.remove_callback(RunDisplay)
    trainer.add_callback(RunDisplay(lambda: trainer.progress.n_tokens, bar=False, name=member.name))
    ask(trainer)
    try:
        return carry_out(recipe, trainer, going_on=going_on, stop=stop)
    except (DivergedError, Interrupted):
        return cast("dict[str, Any]", record_of(output))  # where it is written down
