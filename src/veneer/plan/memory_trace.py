"""Two traced steps of a few blocks: live bytes by phase and kind, the work, and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.model.batch.invocation import acting_tokens
from veneer.model.batch.own_cache import KeptBytes
from veneer.model.fused.decoder import fuse, fuse_as_described
from veneer.model.memory.checkpointing import checkpoint_fully, checkpoint_selectively
from veneer.model.memory.offload import ActivationOffload
from veneer.model.quantized.module import CodedModule
from veneer.ops.traced import tracing
from veneer.plan.draw import ENGINE, PAGES, TracedDraw, draw_of, packed_in
from veneer.plan.live_bytes import LiveBytes, Peak, peaks
from veneer.plan.losses import Loss, loss_of, reference_of, trained_tokens
from veneer.plan.model import adapter_of, ready_to_train, traced_base
from veneer.plan.parts import tell_parts
from veneer.plan.serving import kept_in_engine
from veneer.plan.step import Batch, Step, as_accelerate
from veneer.plan.work import CountWork, Work
from veneer.recipe.adapter import FROM
from veneer.recipe.optimizers import steps_in_backward
from veneer.recipe.recipe import Recipe
from veneer.train.config import SFTConfig
from veneer.train.optimizer import choose_optimizer, lora_plus_optimizer
from veneer.train.preference.reference import Reference

FIRST = "first step: "
BASE, EMBEDDINGS, HEAD, NORMS = "base", "embeddings", "head", "norms and biases"
ADAPTERS, GRADIENTS, STATE = "adapters", "gradients", "optimizer state"
TRAINED = "trained weights"
ACTIVATIONS, LOGITS, SCRATCH = "activations", "logits and loss", "scratch"
KINDS = (
    BASE,
    EMBEDDINGS,
    HEAD,
    NORMS,
    ENGINE,
    PAGES,
    TRAINED,
    ADAPTERS,
    GRADIENTS,
    STATE,
    ACTIVATIONS,
    LOGITS,
    SCRATCH,
)


@dataclass(frozen=True, slots=True)
class Shallow:
    """Results of tracing two steps of a model that has only ``n_blocks`` blocks.

    ``peaks`` are those of the second step, by the name of each part of it. If ``reaches_all``, each trained parameter
    got a gradient.
    """

    n_blocks: int
    peaks: Mapping[str, Peak]
    held: Peak
    work: Work
    n_trained: int
    n_parameters: int
    largest_coded: int
    not_fused: str | None
    reaches_all: bool
    drawing: TracedDraw | None


def trace(
    config: PreTrainedConfig,
    recipe: Recipe,
    batch: Batch,
    isa: str | None = None,
    held_out: Batch | None = None,
    *,
    warm: bool = False,
    n_processes: int = 1,
) -> Shallow:
    """Trace a recipe's step on a model of this config, which is built without values.

    The evaluation of a ``held_out`` batch is traced too. ``warm``: another depth of this recipe's model was traced
    before in this process, and each of its trained parameters got a gradient. ``n_processes`` train together. Errors of
    building and adapting the model are raised.
    """
    live, counted, args, adapter = LiveBytes(), CountWork(), recipe.training_config(), adapter_of(recipe.adapter)
    draw, fresh = draw_of(recipe.task, args, batch), None if FROM in recipe.adapter else adapter
    kept, block = (KeptBytes(0), 1) if draw is None else kept_in_engine(config, recipe.model)
    with tracing(counted.kernel, isa) as mode:
        base = traced_base(config, recipe.model, frozen=adapter is not None)
        coded, n_base = list(_coded(base)), n_parameters(base)
        drawing = (
            None
            if draw is None
            else TracedDraw(base, draw, args, fresh, kept, block, n_processes=n_processes, packs=isa is None)
        )
        n_base -= n_parameters(base)  # a packed weight is no parameter
        model = ready_to_train(base, adapter)
        if adapter is not None and getattr(args, "disable_dropout", False):
            cast(Any, model).adapter_state.drops = False
        not_fused = prepare(model, args)
        optimizer, reference = make_optimizer(model, args), reference_of(recipe.task, recipe.adapter, model, args)
        mode.seen = live.see, counted.see
        for tensor, kind in (*kinds_of(model), *kinds_of_copies(reference), *kinds_of_engine(model, drawing)):
            live.hold(tensor, kind)
        held = peaks(live.events, live.kinds, kind_under)["load"]
        loss = loss_of(recipe.task, reference, args, batch.n_taught)
        reaches_all = run_steps(
            model, optimizer, batch, args, live,
            loss=loss, counted=counted, held_out=held_out, warm=warm, drawing=drawing,
        )  # fmt: skip
    found = {mark: peak for mark, peak in peaks(live.events, live.kinds, kind_under).items() if FIRST not in mark}
    return Shallow(
        n_blocks=config.get_text_config().num_hidden_layers,
        peaks={mark: peak for mark, peak in found.items() if mark not in ("load", "done")},
        held=held,
        work=counted.of_one(args.gradient_accumulation_steps),
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        n_parameters=n_parameters(model) + n_base,
        largest_coded=max(coded, default=0) if recipe.model.quantization != "none" else 0,
        not_fused=not_fused,
        reaches_all=reaches_all,
        drawing=drawing,
    )


def prepare(model: PreTrainedModel, args: SFTConfig, *, with_values: bool = False) -> str | None:
    """Set up checkpointing and fusing as the trainer does. Return the reason if the model is not fused,
    otherwise None.
    """
    if args.gradient_checkpointing:
        settings = args.gradient_checkpointing_kwargs or {}
        if settings.get("selective"):
            checkpoint_selectively(model, settings.get("every_n_layers") or 1)
        elif settings.get("use_reentrant"):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        else:
            checkpoint_fully(model)
    if args.fused == "off":
        return "training.fused is off"
    if with_values:
        return None if fuse(model) else "it does not fit"
    return fuse_as_described(model)


def make_optimizer(model: PreTrainedModel, args: SFTConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a run."""
    choice = choose_optimizer(args, model)
    if args.lora_plus is not None:
        return cast(torch.optim.Optimizer, lora_plus_optimizer(args, model, args.lora_plus, choice))
    cls, settings = choice
    given = (
        settings if "params" in settings else {"params": [p for p in model.parameters() if p.requires_grad], **settings}
    )
    return cls(**given)


def run_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    args: SFTConfig,
    live: LiveBytes,
    *,
    loss: Loss = trained_tokens,
    counted: CountWork | None = None,
    held_out: Batch | None = None,
    warm: bool = False,
    drawing: TracedDraw | None = None,
) -> bool:
    """Run two steps and an evaluation, and report the kinds of tensors to ``live``. Return `Step.reaches_all`.

    Only the second step has the optimizer's state from its start. If a run sums gradients of several micro-batches, the
    second step has two, and gradients exist from its start. If ``warm``, the process has run such a step before. Then
    the first step is only its update, unless the optimizer updates within the backward pass. If ``drawing`` is given,
    answers are generated before the second step.
    """
    offload = ActivationOffload(model, "disk") if args.activation_offloading else None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    number = 0
    if counted is not None:
        tell_parts(counted, model, optimizer)

    def mark(name: str) -> None:
        live.mark(f"{FIRST}{name}" if number == 0 else name)
        if counted is not None:
            counted.mark(name)

    def gradients() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                live.hold(parameter.grad, GRADIENTS)

    vocabulary, first = model.config.get_text_config().vocab_size, acting_tokens(model)  # so that it acts on all
    step = Step(
        model, optimizer, batch.inputs(vocabulary, first), mark, loss=loss,
        max_grad_norm=args.max_grad_norm or 0.0, offload=offload, after_backward=gradients,
    )  # fmt: skip
    with ExitStack() as stack:
        if offload is not None:
            stack.callback(offload.close)
        stack.enter_context(as_accelerate(model, dtype))
        stack.enter_context(step.marked())
        if warm and not steps_in_backward(args.optim):
            step.begin()
        else:
            step.run()
        number = 1
        for tensor in state_tensors(optimizer):
            live.hold(tensor, STATE)
        if counted is not None:
            counted.on = True
        if drawing is not None:
            drawing.run(step, live, counted, batch)
        step.run(n_passes(args))
        if held_out is not None:
            with nullcontext() if counted is None else counted.paused():
                step.evaluate(held_out.inputs(vocabulary, first))
    for tensor in state_tensors(optimizer):
        live.hold(tensor, STATE)
    return step.reaches_all


def n_passes(args: SFTConfig) -> int:
    """Return the number of micro-batches in the second step of `run_steps`."""
    return min(2, int(args.gradient_accumulation_steps))


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield every tensor that the optimizer keeps between steps."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def kind_under(mark: str) -> str:
    """Return the kind of tensors that are allocated under a mark and were not given a kind."""
    mark = mark.removeprefix(FIRST)
    if mark in ("loss", "backward.loss", "evaluation.loss", "score.loss"):
        return LOGITS
    return ACTIVATIONS if mark.startswith(("forward", "evaluation", "draw", "score")) else SCRATCH


def kinds_of(model: PreTrainedModel) -> Iterator[tuple[Tensor, str]]:
    """Yield every tensor that a model has before its first step, with its kind; codes with their storage format."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    special = {
        id(t): kind
        for m, kind in ((head, HEAD), (embeddings, EMBEDDINGS))
        if m
        for t in (m.buffers(recurse=False) if isinstance(m, CodedModule) else m.parameters(recurse=False))
    }
    full = not hasattr(model, "adapter_state")
    for module in model.modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            if tensor is None:
                continue
            if full and tensor.requires_grad:
                yield tensor, TRAINED
            elif id(tensor) in special:
                yield tensor, special[id(tensor)]
            elif isinstance(module, CodedModule) and name in module.spec.part_layout():
                yield tensor, BASE
            elif (isinstance(tensor, nn.Parameter) and tensor.requires_grad) or isinstance(module, nn.ParameterDict):
                yield tensor, ADAPTERS
            else:
                yield tensor, BASE if tensor.ndim > 1 else NORMS


def kinds_of_copies(reference: Reference | None) -> Iterator[tuple[Tensor, str]]:
    """Yield the tensors of an adapter that a reference keeps unchanged, with their kind."""
    for copy in [] if reference is None else reference.copies():
        for tensor in (*copy.parameters(), *copy.buffers()):
            yield tensor, ADAPTERS


def kinds_of_engine(model: nn.Module, drawing: TracedDraw | None) -> Iterator[tuple[Tensor, str]]:
    """Yield the packed weights of a model's own layers, and then those of an engine, with their kinds."""
    if drawing is not None:
        yield from ((tensor, BASE) for tensor in packed_in(model))
        yield from ((tensor, ENGINE) for tensor in drawing.weights)


def n_parameters(model: nn.Module) -> int:
    """Count the values of the base and its adapters. A quantized matrix counts with its number of values, not with its
    number of bytes.
    """
    return sum(_coded(model)) + sum(p.numel() for p in model.parameters())


def _coded(model: nn.Module) -> Iterator[int]:
    """Yield the number of values of each coded matrix. If head and embeddings share their codes, they count once."""
    coded = {id(m.weight): m.spec.shape for m in model.modules() if isinstance(m, CodedModule)}
    return map(math.prod, coded.values())
