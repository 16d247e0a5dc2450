"""Proves by values, on two short sequences, that a fused block computes what the model's own block computes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.model.blueprint.describe import blocks_of
from veneer.model.blueprint.parts import Experts
from veneer.model.fused.block import CACHES, FusedBlock, keywords_of, leave_out_unfit, own_attention, stream_of
from veneer.model.fused.layout import layout_mask
from veneer.model.program.halves import BlockProgram, Tables
from veneer.model.quantized.quant_linear import computing_dtypes
from veneer.model.sharded.sharding import gathered

# Relative error that rounding explains in what one block adds to the stream.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
SIZE = (2, 11)  # sequences and tokens that a block is checked with
SHORT_WINDOW = 5  # tokens: what a sliding window hides then shows
# What parts of familiar names and another shape, type or use make Python, torch (RuntimeError) and the kernels raise.
STRANGE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
HALVES = ((True, True), (False, True), (True, False), (False, False))  # attention and feed-forward: most of them first


class BlockCall(NamedTuple):
    """A call of a block's own code: its input, its arguments by name, and the values that it returned."""

    x: Tensor
    kwargs: dict[str, Any]
    output: Any

    @property
    def y(self) -> Tensor:
        """The residual stream after the block."""
        return stream_of(self.output)


def prove(model: PreTrainedModel, blocks: list[FusedBlock]) -> tuple[str | None, list[str]]:
    """Stop fusing the halves of blocks whose results differ from the model's own on two short sequences.

    One sequence is at the start of the model's context, one at its end. Return the reason if a block differs even with
    no half fused, otherwise None. Also return the reasons for the halves that are not fused.
    """
    embeddings = cast(Tensor, cast(Any, model).get_input_embeddings().weight)
    ids = ((torch.arange(math.prod(SIZE)).view(SIZE) * 7 + 3) % embeddings.shape[0]).to(model.device)
    most, left_out = max(TOLERANCES.get(dtype, 1e-3) for dtype in computing_dtypes(model)), list[str]()
    with _short_windows(model):
        calls = calls_of(model, blocks, ids)
        if len(calls) != len(blocks):
            return f"its {len(blocks)} blocks are called {len(calls)} times in one pass", []
        for block, call in zip(blocks, calls, strict=True):
            if isinstance(call.output, tuple) != (block.fused_program.block.returns is not None):
                told = "more than" if isinstance(call.output, tuple) else "no tuple with"
                return f"its blocks return {told} the stream", []
        for block, call in zip(blocks, calls, strict=True):
            block.fused_program = _with_tables(block.fused_program, call.kwargs.get("position_embeddings"))
            problems = _problems(block, call, most, blocks_of(model)[0].config)
            if len(problems) == len(HALVES):
                return problems[0], []
            left_out += problems[:1]
    return None, list(dict.fromkeys(left_out))


def _problems(block: FusedBlock, call: BlockCall, most: float, config: Any) -> list[str]:
    """Fuse both halves of a block, or only one, or none: the first choice whose relative error is at most ``most``.

    Return a reason for each choice that was tried before and failed.
    """
    found, program = [], block.fused_program
    for attention, mlp in HALVES:
        block.fused_program = program.leaving(attention=attention, mlp=mlp)
        problem = _problem(block, call, most, config)
        if problem is None:
            break
        found.append(problem)
    return found


def _problem(block: FusedBlock, call: BlockCall, most: float, config: Any) -> str | None:
    """Return, in words, how a fused block differs from the model's own code, or None if it does not."""
    try:
        with gathered(block):
            leave_out_unfit(block, call.x.dtype)
        error = _error(block, call, config)
        minds = error <= most and _minds_positions(block, call)
    except STRANGE as strange:
        return f"its blocks have a known structure, but fused they fail: {type(strange).__name__}: {strange}"
    if not error <= most:  # also NaN
        return f"a fused block's output differs by {error:.1e} from that of the model's own code"
    return "its attention uses positions for more than rotary embedding" if minds else None


def _error(block: FusedBlock, call: BlockCall, config: Any) -> float:
    """Return the relative error of the change that a fused block makes to the residual stream.

    For a mixture of experts in 16 bits, it is the median of the rows' errors. There rounding may choose the other of
    two experts with nearly equal scores, and the error of such a row does not show that the block is wrong.
    """
    mask = layout_mask(SIZE, None, None, config)
    own = stream_of(block(call.x, **{**_fresh(call.kwargs), "attention_mask": mask})).double()
    wrong, change = own - call.y.double(), call.y.double() - call.x.double()
    by_row = isinstance(block.fused_program.block.feed_forward, Experts) and call.x.dtype.itemsize == 2
    far, size = (torch.linalg.vector_norm(each, dim=-1 if by_row else None) for each in (wrong, change))
    return float((far / size.clamp_min(1e-30)).median())


def _minds_positions(block: FusedBlock, call: BlockCall) -> bool:
    """Return True if attention depends on the absolute position (Llama 4's temperatures), even if only a little."""
    x, kwargs, _ = call
    given = kwargs.get("position_ids")
    if given is None or block.fused_program.attention is None:
        return False
    with gathered(block):
        own, moved = (own_attention(block, {**_fresh(kwargs), "position_ids": i}, x) for i in (given, given.flip(0)))
    return not torch.equal(own, moved)


def _with_tables(program: BlockProgram, tables: tuple[Tensor, Tensor] | None) -> BlockProgram:
    """Return the program with the form of the model's cosine and sine tables, found from their values.

    The first row is that of position 0, whose sine is 0, so it shows which table is the sine. A table may hold each
    angle twice: side by side if neighbours rotate together, or else in a second copy of the row.
    """
    rotary = program.rotary
    if rotary is None or tables is None:
        return program
    first = tables[0][0, 0]
    twice = 2 * len(first) > rotary.dim and len(first) % 2 == 0
    pairs = rotary.interleaved and twice and all(torch.equal(t[..., ::2], t[..., 1::2]) for t in tables)
    return replace(program, tables=Tables(pairs=pairs, sin_first=not first.any()))


def _fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a block's arguments without the cache."""
    return {key: value for key, value in kwargs.items() if key not in (*CACHES, "use_cache")}


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Enter a context in which sliding windows are short, in the model's modules and in the configs of its masks."""
    owners = {
        id(owner): owner
        for module in model.modules()
        for owner in (module, getattr(module, "config", None))
        if isinstance(owner, nn.Module | PreTrainedConfig)
    }
    windows = [(cast(Any, owner), vars(owner).get("sliding_window")) for owner in owners.values()]
    long = [(owner, window) for owner, window in windows if isinstance(window, int) and window > SHORT_WINDOW]
    try:
        for owner, _ in long:
            owner.sliding_window = SHORT_WINDOW
        yield
    finally:
        for owner, window in long:
            owner.sliding_window = window


def calls_of(model: PreTrainedModel, blocks: list[FusedBlock], ids: Tensor) -> list[BlockCall]:
    """Run the model on ``ids``, and return each block's call. The blocks run the model's own code, because a cache is
    given.
    """
    calls: list[BlockCall] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs.pop("hidden_states")
        calls.append(BlockCall(x, keywords_of(cast(FusedBlock, module), args[1:], kwargs), output))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    try:
        holder = blocks_of(model)[0]
        holder(input_ids=ids, use_cache=True, **_positions(holder, ids))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _positions(holder: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the argument ``position_ids``: one row at the start of the context, and one at its end. Return an empty
    dict if the model does not accept position ids, or if its context has no limit.
    """
    end = getattr(holder.config, "max_position_embeddings", None)
    if end is None or "position_ids" not in inspect.signature(holder.forward).parameters:
        return {}
    starts = torch.tensor([0, max(end - ids.shape[1], 0)], device=ids.device)
    return {"position_ids": starts[:, None] + torch.arange(ids.shape[1], device=ids.device)}
