"""Transformer block that runs on fused kernels where it can. Its class changes in place; the module stays.

A block has two halves: attention and the feed-forward part. Each adds its output to the residual stream.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint import parts as blueprint
from veneer.model.blueprint.masks import RECURRENT, is_recurrent
from veneer.model.blueprint.read_attention import window_of
from veneer.model.blueprint.read_forward import values_returned
from veneer.model.fused.layout import LayoutMask
from veneer.model.inplace import InPlace, base_of
from veneer.model.memory.checkpointing import is_selective
from veneer.model.program.acting import Acting, bottlenecks, computed_in, is_plain
from veneer.model.program.halves import BlockProgram
from veneer.model.program.stretch import ActingStretch, PackedPositions, TrainedStretch
from veneer.model.sites.residual import ResidualAdapters
from veneer.model.sites.structure import SublayerKind

Halves = tuple[ActingStretch | None, ActingStretch | None]
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
SPECIAL = (*CACHES, "encoder_hidden_states")


class FusedBlock(InPlace, nn.Module):
    """Mixin before the class of a block. Each half of the block runs fused if all its parts support that
    at the time.
    """

    fused_program: BlockProgram

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch for checkpointing. It is off if the block is checkpointed selectively, which the block
        does itself.
        """
        return bool(vars(self).get("gradient_checkpointing")) and not is_selective(self)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        vars(self)["gradient_checkpointing"] = on

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = keywords_of(self, args, kwargs)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, LayoutMask):
            return _again(self, functools.partial(super().forward, **kwargs), hidden_states)
        return _run(self, hidden_states, mask, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(block: FusedBlock, x: Tensor, mask: LayoutMask, kwargs: dict[str, Any]) -> Any:
    program = block.fused_program
    attention, mlp = halves_now(block, x, kwargs)
    positions = _positions(kwargs.get("position_embeddings"), mask, program)
    if attention is None:
        masks = {name: each for name, each in kwargs.items() if isinstance(each, LayoutMask)}
        kwargs = {**kwargs, **{name: _own_mask(block, name, each, x) for name, each in masks.items()}}
        bounds = mask.cu_seqlens.tolist()
        leaks = keeps_state(program.block.attention) and len(bounds) > len(x) + 1
        if mlp is None and not leaks:
            return _again(block, functools.partial(super(FusedBlock, block).forward, **kwargs), x)
        own = functools.partial(_each_apart, bounds=bounds) if leaks else own_attention
        h = _again(block, functools.partial(own, block, kwargs), x)
    else:
        h = run_half(block, "attention", attention, x, x, positions)
    fed = x if program.block.parallel else h
    if mlp is not None:
        h = run_half(block, "mlp", mlp, fed, h, positions)
    else:
        h = _again(block, functools.partial(_own_mlp, block, kwargs), fed, h)
    n = program.block.returns
    return h if n is None else (h, *[None] * (n - 1))  # attention weights, which nobody asked for


def keeps_state(part: object) -> bool:
    """Return True if a part in attention's place keeps a state, which goes on from one token to the next."""
    recurrent = isinstance(part, blueprint.Mixer) and is_recurrent(part.layer_type)
    return recurrent or isinstance(part, blueprint.KeepsState)


def stream_of(output: Any) -> Tensor:
    """Return the residual stream from the values that a block returned."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def run_half(
    block: FusedBlock, kind: SublayerKind, half: ActingStretch, x: Tensor, stream: Tensor, positions: PackedPositions
) -> Tensor:
    """Run one half of a block on its input x, and return the residual stream after it."""
    if half.adds:
        return half(x, positions, None if x is stream else stream)
    return stream + _changed(block, kind, half(x, positions), x)


def _changed(block: FusedBlock, kind: SublayerKind, change: Tensor, x: Tensor) -> Tensor:
    """Apply the bottleneck adapters of a half to its output ``change``. x is the half's input."""
    norms, acting = block.fused_program.block.norms, cast(ResidualAdapters, bottlenecks(block, kind))
    norm = norms.attention if kind == "attention" else norms.feed_forward
    return _weighed(block, acting.changed(change, _through(block, norm, x) if acting.reads_input else None))


def own_attention(block: FusedBlock, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """Return the residual stream after the attention half, computed by the model's own code."""
    part = block.fused_program.block
    if isinstance(part.attention, blueprint.Absent):
        return x
    if isinstance(part.attention, blueprint.Several):
        return _without(block, part.feed_forward.path, kwargs, x)
    module = getattr(block, part.attention.path)
    if isinstance(part.attention, blueprint.Mixer | blueprint.KeepsState):
        kwargs = _passed_on(block, module, kwargs)
    change = module(hidden_states=_through(block, part.norms.attention, x), **kwargs)
    change = change[0] if isinstance(change, tuple) else change
    return x + _weighed(block, _through(block, part.norms.attention_post, change))


def _each_apart(block: FusedBlock, kwargs: dict[str, Any], x: Tensor, bounds: list[int]) -> Tensor:
    """Run `own_attention` on each sequence of packed rows by itself, and return the joined outputs in the shape of x.

    This is for a part that keeps a state, because transformers' code would carry the state from one sequence to the
    next.
    """
    flat, alone = x.flatten(0, 1), {**kwargs, "attention_mask": None}
    parts = [own_attention(block, alone, flat[None, start:end]) for start, end in itertools.pairwise(bounds)]
    return torch.cat(parts, 1).view(x.shape)


def _own_mask(block: FusedBlock, name: str, mask: LayoutMask, x: Tensor) -> Tensor | None:
    """Return a mask in transformers' form for a block whose attention half runs transformers' code.

    ``name`` is the argument that receives the mask. A block may also have an argument for the mask of a recurrent part
    (Falcon-H1).
    """
    attention = block.fused_program.block.attention
    if isinstance(attention, blueprint.Mixer | blueprint.KeepsState):
        return mask.of_type(getattr(attention, "layer_type", RECURRENT), x)
    if name != "attention_mask":
        return mask.of_type(RECURRENT, x)
    module = getattr(block, attention.path)
    return mask.dense_for(module, x, window_of(module))


def _without(block: FusedBlock, path: str, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """Run the block's own forward, with the part at a path replaced by one that adds nothing, and return the residual
    stream.
    """
    part = cast(nn.Module, getattr(block, path))
    block._modules[path] = _Silent(values_returned(part))
    try:
        return stream_of(super(FusedBlock, block).forward(x, **kwargs))
    finally:
        block._modules[path] = part


class _Silent(nn.Module):
    """Module that temporarily replaces a part of a block, so that the part adds nothing. It returns zeros, followed by
    a None for each further value that the part returns.
    """

    def __init__(self, n_values: int | None) -> None:
        super().__init__()
        self.n_values = n_values

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.n_values is None else (zeros, *[None] * (self.n_values - 1))


def _passed_on(block: FusedBlock, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of the block's arguments that it passes on to a part.

    These are the arguments that the part's signature names. If the part accepts any keyword, the arguments that the
    block's own signature does not name are passed on too.
    """
    taken, own = (_parameters(cast(Hashable, cls)) for cls in (type(module), base_of(type(block))))
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return {name: value for name, value in kwargs.items() if name in taken or (takes_any and name not in own)}


def _own_mlp(block: FusedBlock, kwargs: dict[str, Any], x: Tensor, stream: Tensor) -> Tensor:
    """Return the residual stream after the feed-forward half, computed by the model's own code."""
    part = block.fused_program.block
    if isinstance(part.feed_forward, blueprint.Absent):
        return stream
    if isinstance(part.feed_forward, blueprint.Several):
        return _without(block, part.attention.path, kwargs, stream)
    change = getattr(block, part.feed_forward.path)(_through(block, part.norms.feed_forward, x))
    change = change[0] if isinstance(change, tuple) else change  # with a router's scores
    return stream + _weighed(block, _through(block, part.norms.feed_forward_post, change))


def _again(block: FusedBlock, function: Callable[..., Any], *args: Tensor) -> Any:
    """Run the model's own code. Under selective checkpointing it is computed again in the backward pass."""
    return cast(Any, block)._gradient_checkpointing_func(function, *args) if is_selective(block) else function(*args)


def keywords_of(block: FusedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, except the first, the residual stream: GPT-2 passes some of
    them by position.
    """
    return {**dict(zip(_names(cast(Hashable, base_of(type(block)))), args, strict=False)), **kwargs} if args else kwargs


def halves_now(block: FusedBlock, x: Tensor, kwargs: dict[str, Any]) -> Halves:
    """Return both halves for a call with these arguments. A half is None if the model's own code must run it."""
    dtype = computed_in(x)
    special = any(kwargs.get(name) is not None for name in SPECIAL)
    if special or dtype is None or not isinstance(kwargs.get("attention_mask"), LayoutMask):
        return None, None
    return halves_of(block, x.dtype, dtype)


def halves_of(block: FusedBlock, stream: torch.dtype, dtype: torch.dtype) -> Halves:
    """Return both halves in their current state, for a residual stream of dtype ``stream`` and computation in
    ``dtype``.

    A half that is not fused is None.
    """
    if _drops(block):
        return None, None
    program, at = block.fused_program, Acting(block, stream, dtype)
    attention = _half_of(program.attention, program.block.attention.path, "attention", at)
    mlp = _half_of(program.mlp, program.block.feed_forward.path, "mlp", at)
    return (None, None) if program.is_whole and (attention is None or mlp is None) else (attention, mlp)


def leave_out_unfit(block: FusedBlock, dtype: torch.dtype) -> None:
    """Stop fusing halves that the kernels cannot run on a residual stream of this dtype."""
    attention, mlp = halves_of(block, dtype, dtype)
    block.fused_program = block.fused_program.leaving(attention=attention is not None, mlp=mlp is not None)


def _half_of(half: TrainedStretch | None, name: str, kind: SublayerKind, at: Acting) -> ActingStretch | None:
    if half is not None and bottlenecks(at.block, kind) is not None:
        half = half.without_sum
    if half is None:
        return None
    module = at.module(name)
    plain = module is at.block or is_plain(module)  # a block's own hooks run around it
    return half.acting(at, again=is_selective(at.block)) if plain and not _drops_within(module) else None


def _drops(block: nn.Module) -> bool:
    """Return True if the block has dropout on the outputs of its halves."""
    return block.training and (_has_rate(block) or any(_is_dropout(part) for part in block.children()))


def _drops_within(module: nn.Module) -> bool:
    """Return True if dropout acts inside a half."""
    return module.training and (_has_rate(module) or any(_is_dropout(part) for part in module.modules()))


def _is_dropout(part: nn.Module) -> bool:
    return isinstance(part, nn.Dropout) and part.p > 0


def _has_rate(module: nn.Module) -> bool:
    """Return True if a module stores the rate of a dropout that its own code applies, such as ``attention_dropout``."""
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def _through(block: nn.Module, norm: blueprint.Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else cast(Tensor, getattr(block, norm.path)(x))


def _weighed(block: FusedBlock, change: Tensor) -> Tensor:
    multiplier = block.fused_program.block.residual_multiplier
    return change if multiplier == 1 else change * multiplier


def _positions(tables: tuple[Tensor, Tensor] | None, mask: LayoutMask, program: BlockProgram) -> PackedPositions:
    """Return positions for the kernels, with tables of cosine and sine that hold each angle once. The tables are None
    for a layer without rotary embedding.

    Most of transformers' tables hold each angle twice; GPT-J's do not.
    """
    if tables is None or program.rotary is None:
        return PackedPositions(None, None, mask.cu_seqlens, mask.forks)
    width = tables[0].shape[-1]
    once = slice(None) if 2 * width == program.rotary.dim else slice(width // 2)
    first, second = (t[..., slice(None, None, 2) if program.tables.pairs else once] for t in tables)
    cos, sin = (second, first) if program.tables.sin_first else (first, second)
    return PackedPositions(cos, sin, mask.cu_seqlens, mask.forks)


@functools.cache
def _names(cls: Hashable) -> list[str]:
    """Return the names of a block's positional arguments without the first, the residual stream."""
    return list(_parameters(cls))[2:]


@functools.cache
def _parameters(cls: Hashable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cast("type[nn.Module]", cls).forward).parameters
