"""Program of a decoder: its operations in order, compiled from its description. Plain data.

The operations read and write named registers: the stream ``h`` of all rows (n, width), and what the halves of a block
hand on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

from veneer.contract.keys import SUBLAYER
from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Block, Decoder, Embedding, Head
from veneer.model.blueprint.parts import Attention, Experts, Linear, Norm, Strange
from veneer.model.blueprint.rotary import DynamicScaling, LongRopeScaling, Rotary
from veneer.model.program.activate import Activate
from veneer.model.program.add import Add
from veneer.model.program.attend import Attend
from veneer.model.program.embed import Embed
from veneer.model.program.into_stream import IntoStream
from veneer.model.program.logits import Logits, Pick
from veneer.model.program.norm import Normalize
from veneer.model.program.operation import STREAM, Keys, Operation, Register
from veneer.model.program.own_module import OwnModule
from veneer.model.program.product import Product


@dataclass(frozen=True)
class Program:
    """Operations of a whole pass over a decoder with a ``head``, for sequences of at most ``n_positions``."""

    operations: tuple[Operation, ...]
    n_positions: int
    embedding: Embedding
    head: Head
    attentions: tuple[Attention, ...]

    @property
    def states(self) -> tuple[Keys, ...]:
        """State that each token leaves, by layer."""
        return tuple(each.state for each in self.operations if each.state is not None)

    @property
    def numbers_per_position(self) -> int:
        """Number of values in the keys and values of a token."""
        return sum(state.n_numbers for state in self.states)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Rotations, each once."""
        return tuple(dict.fromkeys(part.rotary for part in self.attentions if part.rotary is not None))

    @property
    def groups(self) -> tuple[tuple[Linear, ...], ...]:
        """Linear layers that read the same input, in the order in which they run."""
        return tuple(dict.fromkeys(each.layers for each in self.operations if each.layers))

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Linear layers that operations compute, by path."""
        return {linear.path: linear for group in self.groups for linear in group}

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """Norms before and after half blocks, and of the head, by path; not those of attention heads."""
        return {norm.path: norm for each in self.operations for norm in each.norms}

    @cached_property
    def sites(self) -> frozenset[str]:
        """Places of bottlenecks."""
        return frozenset(each.site for each in self.operations if each.site)


def compile_program(decoder: Decoder, n_positions: int) -> Program:
    """Return the program of a decoder, for sequences of at most ``n_positions``.

    Raises DescriptionError that names the part without an operation.
    """
    reason = next(_unsaid(decoder, n_positions), None)
    if reason is not None or decoder.head is None:
        raise DescriptionError(reason or "it has no head of logits")
    stream, head = Register(STREAM, (decoder.embedding.width,)), decoder.head
    operations = (
        Embed(embedding=decoder.embedding, target=stream),
        *(each for layer, block in enumerate(decoder.blocks) for each in _of_block(layer, block, stream)),
        Pick(norm=decoder.norm, head=head, stream=stream),
        Logits(norm=decoder.norm, head=head, stream=stream),
    )
    return Program(operations, n_positions, decoder.embedding, head, decoder.attentions)


def _unsaid(decoder: Decoder, n_positions: int) -> Iterator[str]:
    """The names of the parts that a program has no operation for."""
    yield from (f"{part.path}: {part.reason}" for part in decoder.strange)
    positions = decoder.embedding.positions
    if positions is not None and n_positions + positions.offset > positions.rows:
        yield f"{positions.path} has {positions.rows} positions, and sequences may have {n_positions}"
    for part in decoder.attentions:
        if part.alibi:
            yield f"{part.path} has a bias that falls with distance (ALiBi)"
        scaling = None if part.rotary is None else part.rotary.scaling
        depends = isinstance(scaling, DynamicScaling | LongRopeScaling)
        if part.rotary is not None and depends and n_positions > _original(part.rotary):
            yield (
                f"the rotary frequencies of {part.path} depend on the length of a sequence beyond "
                f"{_original(part.rotary)} tokens: set max_model_len to that"
            )


def _original(rotary: Rotary) -> int:
    """The context within which frequencies do not depend on the length."""
    scaling = rotary.scaling
    return scaling.original_max_positions if isinstance(scaling, LongRopeScaling) else rotary.max_positions


def _of_block(layer: int, block: Block, stream: Register) -> Iterator[Operation]:
    norms = block.norms
    seen = yield from _normed(norms.attention, stream, "x")
    fed = seen
    if block.parallel and norms.feed_forward != norms.attention:
        fed = yield from _normed(norms.feed_forward, stream, "fed")
    yield from _attention(layer, block, seen, stream)
    if not block.parallel:
        fed = yield from _normed(norms.feed_forward, stream, "x")
    yield from _feed_forward(block, fed, stream)


def _attention(layer: int, block: Block, seen: Register, stream: Register) -> Iterator[Operation]:
    part = block.attention
    assert isinstance(part, Attention)
    qkv, mixed = _outputs("qkv", part.qkv), Register("mixed", (part.heads.n_heads * part.heads.head_dim,))
    yield Product(linears=part.qkv, source=seen, target=qkv)
    yield Attend(layer=layer, attention=part, source=qkv, target=mixed)
    half = _Half(f"{block.path}.{SUBLAYER}attention", seen, stream, block.residual_multiplier)
    yield from half.joined(part.out, mixed, block.norms.attention_post)


def _feed_forward(block: Block, fed: Register, stream: Register) -> Iterator[Operation]:
    part, post = block.feed_forward, block.norms.feed_forward_post
    assert not isinstance(part, Strange)
    half = _Half(f"{block.path}.{SUBLAYER}mlp", fed, stream, block.residual_multiplier)
    if isinstance(part, Experts):
        yield OwnModule(path=part.path, source=fed, target=half.register)
        yield from half.added(post)
        return
    inner, acted = _outputs("inner", part.inner), Register("acted", (part.width,))
    yield Product(linears=part.inner, source=fed, target=inner)
    yield Activate(activation=part.activation, gated=part.gated, source=inner, target=acted)
    yield from half.joined(part.down, acted, post)


def _outputs(name: str, linears: tuple[Linear, ...]) -> Register:
    return Register(name, tuple(linear.out_features for linear in linears))


def _normed(norm: Norm | None, source: Register, name: str) -> Generator[Operation, None, Register]:
    """Add the norm of a half, if there is one. Return the register that the half reads."""
    if norm is None:
        return source
    target = Register(name, source.widths)
    yield Normalize(norm=norm, source=source, target=target)
    return target


@dataclass(frozen=True, slots=True)
class _Half:
    """Half of a block that reads ``beside``: the way of its output into the stream."""

    site: str
    beside: Register
    stream: Register
    multiplier: float

    @property
    def register(self) -> Register:
        """Its output."""
        return Register("half", self.stream.widths)

    def joined(self, linear: Linear, source: Register, post: Norm | None) -> Iterator[Operation]:
        """The last layer of the half, into the stream."""
        if post is None and self.multiplier == 1 and not linear.bias:
            yield IntoStream(linear=linear, site=self.site, source=source, beside=self.beside, stream=self.stream)
            return
        yield Product(linears=(linear,), source=source, target=self.register)
        yield from self.added(post)

    def added(self, post: Norm | None) -> Iterator[Operation]:
        """The half's output, into the stream."""
        if post is not None:
            yield Normalize(norm=post, source=self.register, target=self.register)
        yield Add(
            site=self.site, source=self.register, beside=self.beside, stream=self.stream, multiplier=self.multiplier
        )
