"""Decoder as a program: a list of instructions of ten kinds, compiled from its description. Plain data.

The instructions read and write named registers: ``h`` is the stream of all rows (n, width). An interpreter binds the
program's paths to weights (`interpreter`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

from veneer.contract.keys import SUBLAYER
from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Block, Decoder, Embedding, Head
from veneer.model.blueprint.parts import Attention, Experts, FeedForward, Linear, Norm, Strange
from veneer.model.blueprint.rotary import DynamicScaling, LongRopeScaling, Rotary

STREAM = "h"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """Start of the stream: table, multiplier, learned positions, norm."""

    embedding: Embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalize:
    """Norm: ``target = norm(source)``."""

    norm: Norm
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Linear layers: ``target = [W x + c, …]``, a list of the outputs of each layer for the same ``source``."""

    linears: tuple[Linear, ...]
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads from the outputs in ``source``: clipped, normed, rotated.

    Queries are written to ``target``, keys and values to pages. ``layer`` is their index in a page.
    """

    layer: int
    attention: Attention
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """Attention of the queries in ``source`` to the pages of their sequences, as ``target`` (n, heads · width)."""

    layer: int
    attention: Attention
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """Activation of the outputs in ``source``, gated or not, as ``target``."""

    part: FeedForward
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChange:
    """Place of bottlenecks that change the output ``target`` of a half block with input ``source``."""

    site: str
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ByOwnModule:
    """Part without an instruction of its own (experts), run by the model's own code: ``target = module(source)``."""

    path: str
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """Addition to the stream: ``h += multiplier · source``."""

    source: str
    multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Logits of the rows that need them: norm, head, scale and soft cap."""

    norm: Norm | None
    head: Head


Instruction = Embed | Normalize | Product | Heads | Attend | Activate | StreamChange | ByOwnModule | Add | Logits


@dataclass(frozen=True)
class Program:
    """Instructions of a whole pass, valid for sequences of at most ``n_positions``."""

    instructions: tuple[Instruction, ...]
    n_positions: int

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention of every layer."""
        return tuple(each.attention for each in self.instructions if isinstance(each, Heads))

    @property
    def numbers_per_position(self) -> int:
        """Number of values in the keys and values of a token."""
        return sum(2 * part.heads.n_kv_heads * part.heads.head_dim for part in self.attentions)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Rotations, each once."""
        return tuple(dict.fromkeys(part.rotary for part in self.attentions if part.rotary is not None))

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Linear layers that are instructions, by path."""
        found = (linear for each in self.instructions if isinstance(each, Product) for linear in each.linears)
        return {linear.path: linear for linear in (*found, self.head.linear)}

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """Norms before and after half blocks, and of the head, by path; not those of attention heads."""
        found = (each.norm for each in self.instructions if isinstance(each, Normalize | Logits))
        return {norm.path: norm for norm in found if norm is not None}

    @cached_property
    def sites(self) -> frozenset[str]:
        """Places of bottlenecks."""
        return frozenset(each.site for each in self.instructions if isinstance(each, StreamChange))

    @property
    def embedding(self) -> Embedding:
        """Embedding of the first instruction."""
        return next(each.embedding for each in self.instructions if isinstance(each, Embed))

    @property
    def head(self) -> Head:
        """Head of the last instruction."""
        return next(each.head for each in self.instructions if isinstance(each, Logits))


def compile_program(decoder: Decoder, n_positions: int) -> Program:
    """Return the program of a decoder, for sequences of at most ``n_positions``.

    Raises DescriptionError that names the part without an instruction.
    """
    reason = next(_unsaid(decoder, n_positions), None)
    if reason is not None or decoder.head is None:
        raise DescriptionError(reason or "it has no head of logits")
    halves = (each for layer, block in enumerate(decoder.blocks) for each in _of_block(layer, block))
    last = Logits(norm=decoder.norm, head=decoder.head)
    return Program((Embed(embedding=decoder.embedding), *halves, last), n_positions)


def _unsaid(decoder: Decoder, n_positions: int) -> Iterator[str]:
    """The parts that a program has no instruction for, told."""
    yield from (f"{part.path}: {part.reason}" for part in decoder.strange)
    positions = decoder.embedding.positions
    if positions is not None and n_positions + positions.offset > positions.rows:
        yield f"{positions.path} has {positions.rows} positions, and sequences may have {n_positions}"
    for part in decoder.attentions:
        if part.alibi is not None:
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


def _of_block(layer: int, block: Block) -> Iterator[Instruction]:
    norms, attention, part = block.norms, block.attention, block.feed_forward
    assert not isinstance(attention, Strange)
    assert not isinstance(part, Strange)
    seen = yield from _normed(norms.attention, STREAM, "x")
    fed = seen if norms.feed_forward == norms.attention else "fed"
    if block.parallel and fed == "fed":
        fed = yield from _normed(norms.feed_forward, STREAM, "fed")
    yield Product(linears=attention.qkv, source=seen, target="qkv")
    yield Heads(layer=layer, attention=attention, source="qkv", target="q")
    yield Attend(layer=layer, attention=attention, source="q", target="mixed")
    yield Product(linears=(attention.out,), source="mixed", target="half")
    yield from _joined(norms.attention_post, f"{block.path}.{SUBLAYER}attention", seen, block.residual_multiplier)
    if not block.parallel:
        fed = yield from _normed(norms.feed_forward, STREAM, "x")
    if isinstance(part, Experts):
        yield ByOwnModule(path=part.path, source=fed, target="half")
    else:
        yield Product(linears=part.inner, source=fed, target="inner")
        yield Activate(part=part, source="inner", target="acted")
        yield Product(linears=(part.down,), source="acted", target="half")
    yield from _joined(norms.feed_forward_post, f"{block.path}.{SUBLAYER}mlp", fed, block.residual_multiplier)


def _normed(norm: Norm | None, source: str, target: str) -> Generator[Instruction, None, str]:
    """The norm, if there is one; gives the register of what the half reads."""
    if norm is None:
        return source
    yield Normalize(norm=norm, source=source, target=target)
    return target


def _joined(post: Norm | None, site: str, source: str, multiplier: float) -> Iterator[Instruction]:
    """The way of a half's output into the stream."""
    if post is not None:
        yield Normalize(norm=post, source="half", target="half")
    yield StreamChange(site=site, source=source, target="half")
    yield Add(source="half", multiplier=multiplier)
