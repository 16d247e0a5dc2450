"""Answers that a step draws: how many, the engine's copy of the base, its keys and values, the work of drawing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.token_scores import kept_logits
from veneer.contract import MethodConfig
from veneer.data.tasks import OF_REWARDS
from veneer.errors import DescriptionError
from veneer.evaluate.scoring import context_length
from veneer.learn.policy import ONLY_ON_CPUS, keeps_one_copy
from veneer.model.adapted.packed_experts import pack_experts
from veneer.model.batch.own_cache import KeptBytes
from veneer.model.blueprint.describe import describe
from veneer.model.program.program import Program, compile_program
from veneer.model.quantized.packed_linear import pack_group
from veneer.plan.live_bytes import LiveBytes
from veneer.plan.step import Batch, Step
from veneer.plan.work import CountWork, Work
from veneer.serve.start import STEP_TOKENS, EngineOptions

ENGINE, PAGES = "engine's weights", "keys and values"

_OPTIONS = EngineOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSize:
    """Size of a draw: ``n_answers`` answers of ``n_tokens`` tokens each, to ``n_prompts`` prompts of ``prompt`` tokens,
    generated at once.

    ``n_batches`` micro-batches are trained before the next draw. Log-probabilities of all answers are computed
    ``n_scores`` times without gradients: by the reference, and by the model if the engine's are not used.
    """

    n_answers: int
    n_prompts: int
    prompt: int
    n_tokens: int
    n_batches: float
    n_scores: int = 0
    by_engine: bool = True

    def n_positions(self, block: int) -> int:
        """Return the tokens in the cache when all answers are complete. The engine has whole pages of ``block`` tokens,
        with each prompt only once.
        """
        if not self.by_engine:
            return self.n_answers * (self.prompt + self.n_tokens)
        own = -(-(self.prompt % block + self.n_tokens) // block) * block
        return self.n_prompts * (self.prompt // block * block) + self.n_answers * own


def draw_of(task: str, args: Any, batch: Batch) -> DrawSize | None:
    """Return the size of the draw of a recipe's step, with answers of the maximal length. Return None if the step
    generates no answers.
    """
    n_rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if task == "distill" and args.lmbda > 0:
        n, longest = n_rows * steps, args.max_completion_length
        prompt = max(1, batch.length - longest)
        return DrawSize(n_answers=n, n_prompts=n, prompt=prompt, n_tokens=longest, n_batches=steps / args.lmbda)
    if task not in OF_REWARDS:
        return None
    n, of_engine = n_rows * args.steps_per_generation, args.rollout_engine != "generate"
    n_batches = args.steps_per_generation * args.num_iterations
    is_known = of_engine and not (args.bf16 or args.fp16)  # the engine's log-probabilities are then the old policy's
    scores_old = task == "rloo" or (task == "grpo" and of_engine) or steps % n_batches != 0
    return DrawSize(
        n_answers=n, n_prompts=-(-n // args.num_generations),
        prompt=batch.n_shared, n_tokens=batch.length - batch.n_shared,
        n_batches=n_batches, n_scores=int(args.beta != 0) + int(scores_old and not is_known), by_engine=of_engine,
    )  # fmt: skip


class TracedDraw:
    """Traced generation of a step's answers on a traced base, to which no adapter is attached yet.

    If ``packs``, as on CPUs, the engine packs a copy of the base's weights; on a GPU it reads the base's own.
    ``n_processes`` train together. ``is_one``: the packed weights are the only copy. ``weights`` are the engine's
    packed tensors. ``kept`` are the bytes that a token, a page of ``block`` tokens and a
    sequence take in the cache. If the engine has no program
    for the base, transformers generates. ``work``, after `run`, is the work of generating the answers and of scoring
    them.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        draw: DrawSize,
        args: Any,
        config: MethodConfig | None,
        kept: KeptBytes,
        block: int,
        *,
        n_processes: int = 1,
        packs: bool = True,
    ) -> None:
        self.is_one, self.weights, self.work = False, list[Tensor](), dict[str, Work]()
        if draw.by_engine:
            try:
                program = compile_program(describe(base), context_length(base) or 2048)
            except DescriptionError:
                draw = replace(draw, by_engine=False)
            else:
                reason = None if packs else ONLY_ON_CPUS
                self.is_one = hasattr(args, "rollout_memory") and keeps_one_copy(
                    base, args, config, reason, n_processes
                )
                self.weights = _packed(base, program, self.is_one) if packs else []
        self.draw, self._position = draw, kept.position
        n_positions = draw.n_positions(block)
        n_states = n_positions // block if draw.by_engine else draw.n_answers  # transformers has no pages
        self.n_cached = n_positions * kept.position + draw.n_answers * kept.sequence + n_states * kept.page
        if not draw.by_engine:  # it grows by copies of one layer at a time
            n_blocks: int = base.config.get_text_config().num_hidden_layers
            self.n_cached = self.n_cached * (n_blocks + 1) // n_blocks
        else:  # a schedule begins at 0: two draws by one adapter, whose pages are kept
            self.n_cached *= 2
        self._kept: tuple[Tensor, ...] | None = None

    def _blocks_of(self, model: PreTrainedModel) -> int:
        """Return the bytes of the engine's two copies of the adapter: the one in use, and the next, which replaces it.
        Return 0 if transformers generates.
        """
        n = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        width: int = model.dtype.itemsize
        return 2 * n * width if self.draw.by_engine else 0

    def run(self, step: Step, live: LiveBytes, counted: CountWork | None, batch: Batch) -> None:
        """Generate the answers, and compute the log-probabilities of a micro-batch of them."""
        draw, vocabulary = self.draw, step.model.config.get_text_config().vocab_size
        counted = counted or CountWork()
        step.mark("draw")
        sizes = self.n_cached, self._blocks_of(step.model)
        with counted.paused():
            self._kept = tuple(torch.empty(size, dtype=torch.uint8) for size in sizes)
        for tensor, kind in zip(self._kept, (PAGES, ENGINE), strict=True):
            live.hold(tensor, kind)
        at_once = min(draw.n_answers, _OPTIONS.max_num_seqs)
        own = draw.n_prompts if draw.by_engine else draw.n_answers
        n_rows = max(1, min(own, STEP_TOKENS // max(1, draw.prompt)))
        with counted.apart() as first:
            _pass(step, torch.ones(n_rows, draw.prompt, dtype=torch.long) % vocabulary)
        with counted.apart() as token:
            _pass(step, torch.ones(at_once, 1, dtype=torch.long) % vocabulary)
        if not draw.by_engine:
            self._kept = None
        with counted.apart() as scored:
            step.evaluate(batch.inputs(vocabulary), "score")
        step.mark("done")
        n_tokens = draw.n_tokens * draw.n_answers / at_once
        work = first.plus(first, own / n_rows - 1).plus(token, n_tokens)
        work.moved += self._position * draw.n_tokens * draw.n_answers * (draw.prompt + draw.n_tokens / 2)
        if draw.by_engine:  # one call computes a pass
            work.n_ops = work.n_general = work.n_watched = 0
        n_scored = draw.n_scores * draw.n_answers / batch.n_rows
        self.work = {"draw": work, "score": scored.plus(scored, n_scored - 1)}


def _packed(base: PreTrainedModel, program: Program, is_one: bool) -> list[Tensor]:
    """Pack the weights of ``base`` that ``program`` reads, and return the packed tensors. If ``is_one``, the base gives
    up its unpacked weights.
    """
    groups = [[linear.path for linear in group] for group in program.groups]
    packed: list[Any] = [pack_group(base, paths, give_up=is_one) for paths in groups]
    stacks = [tuple(stack.path for stack in each) for each in program.stacks]
    packed += [pack_experts(base, paths, give_up=is_one) for paths in stacks]
    return list(_tensors_in(packed))


def _pass(step: Step, ids: Tensor) -> None:
    """Compute the logits of the last token of each row."""
    step.model.eval()
    with torch.no_grad():
        kept_logits(step.model, {"input_ids": ids}, torch.tensor([ids.shape[1] - 1]))
    step.model.train()


def _tensors_in(packed: Any) -> Iterator[Tensor]:
    """Yield the tensors of packed weights, however they are nested."""
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, list | tuple):
        for each in packed:
            yield from _tensors_in(each)
    elif hasattr(packed, "parts"):
        yield from _tensors_in(packed.parts)
    elif hasattr(packed, "__dataclass_fields__"):
        yield from _tensors_in([getattr(packed, each.name) for each in fields(packed)])


def packed_in(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of those layers of a model that hold only packed weights."""
    for module in model.modules():
        yield from _tensors_in(getattr(module, "packed_weight", None))
