"""Operations of a block's two halves, attention and feed-forward: for a pass over the decoder, and for training."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from veneer.contract.keys import SUBLAYER
from veneer.model.blueprint.decoder import Block
from veneer.model.blueprint.parts import (
    Absent,
    Attention,
    DeltaNet,
    Experts,
    FeedForward,
    Linear,
    Norm,
    ShortConv,
    Strange,
)
from veneer.model.blueprint.rotary import Rotary
from veneer.model.program.activate import Activate
from veneer.model.program.add import Add
from veneer.model.program.attend import Attend
from veneer.model.program.convolve import Convolve
from veneer.model.program.experts import MixExperts, is_known
from veneer.model.program.gated_delta import GatedDelta
from veneer.model.program.into_stream import IntoStream
from veneer.model.program.norm import Normalize
from veneer.model.program.operation import STREAM, Operation, Register
from veneer.model.program.own_module import OwnModule
from veneer.model.program.product import Product
from veneer.model.program.stretch import Trained, TrainedStretch
from veneer.model.program.wide_product import WideProduct

_PATHS = ("path", "act", "conv", "correction", "sinks", "input_path", "output_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Layout of a model's tables of cosines and sines. ``pairs``: each angle stands twice side by side. ``sin_first``:
    the table of sines comes before that of cosines.
    """

    pairs: bool = False
    sin_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProgram:
    """A ``block`` in training: the operations of its two halves. Paths start at the block.

    ``attention`` and ``mlp`` are None for a half that runs the model's own code. ``tables``: how the model lays out the
    angles of its rotation.
    """

    block: Block
    attention: TrainedStretch | None
    mlp: TrainedStretch | None
    tables: Tables = Tables()

    @property
    def rotary(self) -> Rotary | None:
        """Rotary embedding of queries and keys, if there is one."""
        return self.block.attention.rotary if isinstance(self.block.attention, Attention) else None

    @property
    def is_own(self) -> bool:
        """Return True if both halves run the model's own code."""
        return self.attention is None and self.mlp is None

    @property
    def is_whole(self) -> bool:
        """Return True if the block's halves can only be fused together: a half adds to the residual stream within its
        own module, or the block has no feed-forward part.
        """
        halves = (
            (self.block.attention_sublayer, self.block.attention.path),
            (self.block.feed_forward_sublayer, self.block.feed_forward.path),
        )
        adds_inside = any(place is not None and place.input_path != path for place, path in halves)
        return adds_inside or not self.block.feed_forward.path

    def leaving(self, *, attention: bool, mlp: bool) -> BlockProgram:
        """Return the program with only those halves still fused whose argument is True. If the halves can only be fused
        together (`is_whole`), and one is left out, neither is fused.
        """
        alone = not self.is_whole or (attention and mlp)
        return replace(
            self,
            attention=self.attention if attention and alone else None,
            mlp=self.mlp if mlp and alone else None,
        )


def block_program(block: Block, width: int) -> BlockProgram | str:
    """Return the program of a block in training. ``width`` is that of the residual stream.

    If its attention is unknown, return the reason in words.
    """
    if block.attention.path == block.path:  # nothing of it is known
        return "; ".join(reasons(block, width))
    block = _within(block, len(block.path) + 1)
    attention, mlp = (_stretch(half) for half in _training(block, width))
    known = not block.other  # what is strange is the block itself
    found = BlockProgram(block=block, attention=attention, mlp=mlp)
    return found.leaving(attention=known and attention is not None, mlp=known and mlp is not None)


def reasons(block: Block, width: int) -> list[str]:
    """Return in words why halves of a block cannot be fused in training; empty if both can."""
    parts = [part.reason for part in block.strange if not isinstance(part, Absent)]
    parts += [op.untrained for half in _training(block, width) for op in half if op.untrained is not None]
    return list(dict.fromkeys(parts))


def block_operations(layer: int, block: Block, stream: Register) -> Iterator[Operation]:
    """Yield the operations of a block that is fully described. ``layer`` is its index among the blocks with the same
    kind of stored state.
    """
    norms = block.norms
    seen = yield from _normed(norms.attention, stream, "x")
    fed = seen
    if block.parallel and norms.feed_forward != norms.attention:
        fed = yield from _normed(norms.feed_forward, stream, "fed")
    yield from _attention(layer, block, seen, stream)
    if not block.parallel:
        fed = yield from _normed(norms.feed_forward, stream, "x")
    yield from _feed_forward(block, fed, stream)


def _within(part: Any, before: int) -> Any:
    """Return a description whose paths start at the block, by dropping their first ``before`` characters."""
    if isinstance(part, tuple):
        return tuple(_within(each, before) for each in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    held = {field.name: getattr(part, field.name) for field in fields(part)}
    paths = {name: value[before:] for name, value in held.items() if name in _PATHS}
    return replace(part, **{name: _within(value, before) for name, value in held.items()} | paths)


def _training(block: Block, width: int) -> tuple[tuple[Operation, ...], tuple[Operation, ...]]:
    """Return the operations of attention and of the feed-forward part. Each begins with its own norm, even if both read
    the same one, so that each can be one autograd node.

    A half that the description cannot express has no operations.
    """
    stream, norms = Register(STREAM, (width,)), block.norms
    before = Register("before", stream.widths) if block.parallel else stream
    attention = feed_forward = tuple[Operation, ...]()
    if not isinstance(block.attention, Strange):
        attention = _together(norms.attention, stream, lambda seen: _attention(0, block, seen, stream))
    if not isinstance(block.feed_forward, Strange):
        feed_forward = _together(norms.feed_forward, before, lambda fed: _feed_forward(block, fed, stream))
    return attention, feed_forward


def _together(
    norm: Norm | None, source: Register, half: Callable[[Register], Iterator[Operation]]
) -> tuple[Operation, ...]:
    """Return the operations of a norm, if there is one, and of the half that reads it. An operation that combines
    several (`alone`) is replaced by these.
    """
    before = () if norm is None else (Normalize(norm=norm, source=source, target=Register("x", source.widths)),)
    found = half(before[0].target if before else source)
    return (*before, *(alone for each in found for alone in each.alone))


def _stretch(half: tuple[Operation, ...]) -> TrainedStretch | None:
    trained = tuple(op for op in half if isinstance(op, Trained) and op.untrained is None)
    return TrainedStretch(trained) if trained and len(trained) == len(half) else None


def _attention(layer: int, block: Block, seen: Register, stream: Register) -> Iterator[Operation]:
    part = block.attention
    assert not isinstance(part, Strange)
    half = _Half(f"{block.path}.{SUBLAYER}attention", seen, stream, block.residual_multiplier)
    if isinstance(part, ShortConv):
        inner, mixed = _outputs("inner", (part.inner,)), Register("mixed", (part.width,))
        yield Product(linears=(part.inner,), source=seen, target=inner)
        yield Convolve(layer=layer, part=part, source=inner, target=mixed)
        yield from half.joined(part.out, mixed, block.norms.attention_post)
        return
    if isinstance(part, DeltaNet):
        inner, mixed = _outputs("inner", part.inner), Register("mixed", (part.width,))
        yield Product(linears=part.inner, source=seen, target=inner)
        yield GatedDelta(layer=layer, part=part, source=inner, target=mixed)
        yield from half.joined(part.out, mixed, block.norms.attention_post)
        return
    qkv, mixed = _outputs("qkv", part.qkv), Register("mixed", (part.heads.n_heads * part.heads.head_dim,))
    yield Product(linears=part.qkv, source=seen, target=qkv)
    yield Attend(layer=layer, attention=part, source=qkv, target=mixed)
    yield from half.joined(part.out, mixed, block.norms.attention_post)


def _feed_forward(block: Block, fed: Register, stream: Register) -> Iterator[Operation]:
    part, post = block.feed_forward, block.norms.feed_forward_post
    assert not isinstance(part, Strange)
    half = _Half(f"{block.path}.{SUBLAYER}mlp", fed, stream, block.residual_multiplier)
    if isinstance(part, Experts):
        if is_known(part):
            yield from _mixture(part, fed, half.register)
        else:
            yield OwnModule(path=part.path, source=fed, target=half.register)
        yield from half.added(post)
        return
    acted = yield from _acted(part, fed)
    yield from half.joined(part.down, acted, post)


def _acted(part: FeedForward, fed: Register) -> Generator[Operation, None, Register]:
    """Yield the operations of a feed-forward part before its last layer. Return the register that this layer reads."""
    inner, acted = _outputs("inner", part.inner), Register("acted", (part.width,))
    yield Product(linears=part.inner, source=fed, target=inner)
    yield Activate(path=part.act, activation=part.activation, gated=part.gated, source=inner, target=acted)
    return acted


def _mixture(part: Experts, fed: Register, target: Register) -> Iterator[Operation]:
    scores, shared, gate = _outputs("scores", (part.router,)), None, None
    kind = WideProduct if part.wide_scores else Product
    yield kind(linears=(part.router,), source=fed, target=scores)
    if part.shared is not None:
        acted, shared = (yield from _acted(part.shared, fed)), _outputs("shared", (part.shared.down,))
        yield Product(linears=(part.shared.down,), source=acted, target=shared)
    if part.shared_gate is not None:
        gate = _outputs("shared_gate", (part.shared_gate,))
        yield Product(linears=(part.shared_gate,), source=fed, target=gate)
    yield MixExperts(experts=part, scores=scores, source=fed, shared=shared, shared_gate=gate, target=target)


def _outputs(name: str, linears: tuple[Linear, ...]) -> Register:
    return Register(name, tuple(linear.out_features for linear in linears))


def _normed(norm: Norm | None, source: Register, name: str) -> Generator[Operation, None, Register]:
    """Yield the norm before a half, if there is one. Return the register that the half reads."""
    if norm is None:
        return source
    target = Register(name, source.widths)
    yield Normalize(norm=norm, source=source, target=target)
    return target


@dataclass(frozen=True, slots=True)
class _Half:
    """Last operations of a block's half: they add ``beside`` to the half's output, and write the sum to the residual
    stream's register ``stream``.
    """

    site: str
    beside: Register
    stream: Register
    multiplier: float

    @property
    def register(self) -> Register:
        """Return the register of the half's output."""
        return Register("half", self.stream.widths)

    def joined(self, linear: Linear, source: Register, post: Norm | None) -> Iterator[Operation]:
        """Yield the half's last layer and the addition to the residual stream."""
        if post is None and self.multiplier == 1 and not linear.bias:
            yield IntoStream(linear=linear, site=self.site, source=source, beside=self.beside, stream=self.stream)
            return
        yield Product(linears=(linear,), source=source, target=self.register)
        yield from self.added(post)

    def added(self, post: Norm | None) -> Iterator[Operation]:
        """Yield the addition of the half's output to the residual stream, after the half's post-norm if
        there is one.
        """
        if post is not None:
            yield Normalize(norm=post, source=self.register, target=self.register)
        yield Add(
            site=self.site, source=self.register, beside=self.beside, stream=self.stream, multiplier=self.multiplier
        )
