"""Plan of a run: bytes by kind and by phase, the peak and its composition, the work of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError
from veneer.model.modules.experts import told_experts
from veneer.model.modules.snapshot import look_at
from veneer.ops.traced import tracing
from veneer.plan.architecture import config_of
from veneer.plan.depth import Pattern, between, line, pattern_of, peaks_by_place
from veneer.plan.draw import PAGES, DrawSize
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import SCRATCH, Shallow, trace
from veneer.plan.model import adapter_of, meta_base, shortened, traced_model
from veneer.plan.planned_tasks import ROWS, require_planned
from veneer.plan.rows import prompt_lengths, text_tokens
from veneer.plan.step import Batch
from veneer.plan.work import Work
from veneer.recipe.parts import DataPart, ModelPart
from veneer.recipe.recipe import Recipe

PHASES = ("load", "draw", "score", "forward", "loss", "backward", "optimizer", "evaluation")
SEQUENCE = 256
"""Tokens of a sequence in a packed row, where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Memory and time of a run. ``phases``: the peak of each; ``held``: everything before the first step.

    ``work`` is that of a micro-batch, with its share of the update and of generating answers (``draw``). ``apart`` is
    the work of generating all answers, of scoring them, and of the micro-batches that learn from them. ``copies`` is
    the number of copies of the base in memory.
    """

    recipe: Recipe
    batch: Batch
    config: PreTrainedConfig
    n_trained: int
    n_parameters: int
    held: Peak
    phases: Mapping[str, Peak]
    work: Work
    not_fused: str | None
    draw: DrawSize | None = None
    apart: Mapping[str, Work] = field(default_factory=dict)
    copies: int = 1

    @property
    def peak_phase(self) -> str:
        """Phase with the highest peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].n_bytes)

    @property
    def peak(self) -> Peak:
        """Highest peak of all phases."""
        return self.phases[self.peak_phase]

    @property
    def n_tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch.n_tokens


def plan_recipe(
    recipe: Recipe,
    *,
    config: PreTrainedConfig | None = None,
    batch: Batch | None = None,
    isa: str | None = None,
    whole: bool = False,
    evaluated: bool = True,
    n_processes: int = 1,
) -> Plan:
    """Return the plan of a recipe, from two shallow traces. All blocks are traced if none repeat, or if ``whole``.

    Rows are as long as ``max_length``. ``isa`` is the instruction set of the machine that the plan is for.
    ``evaluated``: if the recipe holds rows out, the evaluation is planned too. ``n_processes`` train together.

    Raises ConfigError if transformers makes no causal language model of the config. Raises it too if the recipe asks
    for one copy of the base (``rollouts.memory``) and the run needs two.
    """
    require_planned(recipe.task, recipe.method)
    config = config or config_of(recipe.model.source)
    batch = batch or batch_of(recipe, config)
    n_blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(n_blocks, int) or n_blocks < 1:
        raise ConfigError(
            f"the config of {recipe.model.source} ({config.model_type}) has no num_hidden_layers to plan by: give a "
            "model whose config has it, with at least one layer"
        )
    pattern = Pattern(n_blocks, 0, n_blocks) if whole else pattern_of(recipe, config, n_blocks)
    held_out = held_out_batch(recipe.data, recipe.task, recipe.training_config(), batch) if evaluated else None
    traces = list[Shallow]()
    for depth in pattern.depths:
        warm = bool(traces) and traces[0].reaches_all
        traces.append(trace(shortened(config, depth), recipe, batch, isa, held_out, warm=warm, n_processes=n_processes))
    return _deepened(traces, pattern, recipe, batch, config)


def batch_of(recipe: Recipe, config: PreTrainedConfig) -> Batch:
    """Return a micro-batch of a recipe whose rows all have the maximal length. Raises ConfigError, also for a task that
    is not planned.
    """
    require_planned(recipe.task, recipe.method)
    args, task = recipe.training_config(), recipe.task
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    n_rows = ROWS[task] * args.per_device_train_batch_size
    prompts = prompt_lengths(task, recipe.model.source, recipe.data)
    if task in OF_REWARDS:
        return _answers(args, max(prompts, default=SEQUENCE))
    length = args.max_length or context or 1024
    if context is not None and length > context:
        raise ConfigError(
            f"training.max_length={length} is more than the {context} tokens of the context of {recipe.model.source}: "
            "lower it"
        )
    shared = min(min(prompts, default=0), length - 1)
    if task == "distill" and args.teacher != "base":
        raise ConfigError(
            f"distillation from another teacher than the base is not planned (distill.teacher: {args.teacher}): its "
            "memory is not counted. A short run writes its memory and seconds to run.json"
        )
    if task == "distill":
        drawn = max(prompts, default=SEQUENCE) + args.max_completion_length if args.lmbda > 0 else 0
        length = max(length, drawn) if args.lmbda < 1 else drawn
        taught = text_tokens(recipe.model.source, args.teacher_prompt)
        return Batch(n_rows=n_rows, length=length, n_trained=length - shared, n_taught=taught)
    if task == "dpo" and shared:
        n_prompts = args.per_device_train_batch_size
        return Batch(n_rows=n_rows, length=length, n_trained=length - shared, n_prompts=n_prompts, n_shared=shared)
    return _full_batch(n_rows, length, bool(getattr(args, "packing", False)))


def _answers(args: Any, prompt: int) -> Batch:
    """Return the size of a micro-batch of generated answers.

    If all micro-batches of a draw belong to one optimizer step, answers to the same prompt are in the same micro-batch.
    Otherwise a micro-batch may hold answers to more prompts.
    """
    n, group, longest = args.per_device_train_batch_size, args.num_generations, args.max_completion_length
    is_one_step = args.steps_per_generation == 1 or args.gradient_accumulation_steps % args.steps_per_generation == 0
    n_prompts = -(-n // group) if is_one_step else min(n, n * args.steps_per_generation // group)
    return Batch(n_rows=n, length=prompt + longest, n_trained=longest, n_prompts=n_prompts, n_shared=prompt)


def held_out_batch(data: DataPart, task: str, args: Any, batch: Batch) -> Batch | None:
    """Return an evaluation batch with rows as long as a micro-batch's; None if nothing is held out."""
    if not data.holds_out:
        return None
    own = getattr(args, "eval_packing", None)
    packed, n_rows = batch.packed if own is None else bool(own), ROWS[task] * args.per_device_eval_batch_size
    return _full_batch(n_rows, batch.length, packed) if task in ("sft", "kto") else batch.with_rows(n_rows)


def _full_batch(n_rows: int, length: int, packed: bool) -> Batch:
    n_sequences = max(1, length // SEQUENCE) if packed else 1
    return Batch(n_rows=n_rows, length=length, n_sequences=n_sequences, packed=packed)


def count_trained(part: ModelPart, adapter: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """Count the parameters that a recipe trains, from the shapes of the model; no step is traced."""
    with tracing():
        model = traced_model(config, part, adapter_of(adapter), encodes=True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def left_out_experts(part: ModelPart, adapter: Mapping[str, Any], config: PreTrainedConfig) -> str | None:
    """Return a line about the experts that an adapter of linear layers leaves out; None if there are none."""
    method = adapter_of(adapter)
    if method is None:
        return None
    return told_experts(look_at(meta_base(config, part, prepared=False, frozen=False)), method)


def _deepened(traces: list[Shallow], pattern: Pattern, recipe: Recipe, batch: Batch, config: PreTrainedConfig) -> Plan:
    low, high = traces[0], traces[-1]
    more = 0 if low is high else (pattern.n_blocks - low.n_blocks) / (high.n_blocks - low.n_blocks)
    marks = [peaks_by_place(shallow, pattern) for shallow in (low, high)]
    deep = {mark: between(marks[0][mark], marks[1][mark], more) for mark in marks[0] if mark in marks[1]}
    held = between(low.held, high.held, more)
    coding = 4 * high.largest_coded  # a matrix is in float32 while it is quantized
    phases = {"load": Peak({**held.kinds, SCRATCH: held.kinds.get(SCRATCH, 0) + coding}) if coding else held}
    for phase in PHASES[1:]:
        own = [peak for mark, peak in deep.items() if mark.split(".")[0] == phase]
        if own:
            phases[phase] = max(own, key=lambda peak: peak.n_bytes)
    work, apart, draw = _at_depth(low.work, high.work, more), dict[str, Work](), None
    if low.drawing is not None and high.drawing is not None:
        draw = high.drawing.draw
        apart = {name: _at_depth(low.drawing.work[name], high.drawing.work[name], more) for name in low.drawing.work}
        apart["train"] = work.plus(work, draw.n_batches - 1)
        work = work.plus(apart["draw"].plus(apart["score"], 1), 1 / draw.n_batches)
    return Plan(
        recipe=recipe,
        batch=batch,
        config=config,
        n_trained=line(low.n_trained, high.n_trained, more),
        n_parameters=line(low.n_parameters, high.n_parameters, more),
        held=held,
        phases=phases,
        work=work,
        not_fused=high.not_fused,
        draw=draw,
        apart=apart,
        copies=2 if high.drawing is not None and high.drawing.weights and not high.drawing.is_one else 1,
    )


def _at_depth(low: Work, high: Work, more: float) -> Work:
    return low.plus(high.plus(low, -1.0), more)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain numbers."""
    return {
        "model": plan.recipe.model.source,
        "task": plan.recipe.task,
        "method": plan.recipe.method,
        "quantization": plan.recipe.model.quantization,
        "batch": {"rows": plan.batch.n_rows, "length": plan.batch.length, "packed": plan.batch.packed} | _shared(plan),
        "path": "general" if plan.not_fused else "fused",
        **({"not_fused": plan.not_fused} if plan.not_fused else {}),
        "trained": {"parameters": plan.n_trained, "share": plan.n_trained / plan.n_parameters},
        "parameters": plan.n_parameters,
        "weights": {"bytes": plan.held.n_bytes, "kinds": dict(plan.held.kinds)},
        "phases": {phase: {"bytes": p.n_bytes, "kinds": dict(p.kinds)} for phase, p in plan.phases.items()},
        "peak": {"phase": plan.peak_phase, "bytes": plan.peak.n_bytes, "kinds": dict(plan.peak.kinds)},
        "flops": plan.work.flops,
        **({} if plan.draw is None else {"draw": _draw_told(plan, plan.draw)}),
    }


def _shared(plan: Plan) -> dict[str, int]:
    batch = plan.batch
    return {"prompts": batch.n_prompts, "shared": batch.n_shared} if batch.n_prompts else {}


def _draw_told(plan: Plan, draw: DrawSize) -> dict[str, Any]:
    """Return the settings of a plan's draw (the generation of answers) as plain numbers, with the peak bytes of
    generating, rewards, scoring and training.
    """
    train = max(plan.phases[phase].n_bytes for phase in ("forward", "loss", "backward", "optimizer"))
    n_bytes = {
        "draw": plan.phases["draw"].n_bytes,
        "rewards": plan.held.n_bytes + plan.phases["draw"].kinds.get(PAGES, 0) * draw.by_engine,
        "score": plan.phases["score"].n_bytes,
        "train": train,
    }
    return {
        **asdict(draw),
        "copies": plan.copies,
        "parts": {name: {"bytes": n} for name, n in n_bytes.items()},
    }
