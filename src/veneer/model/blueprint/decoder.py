"""Description of a decoder: embeddings, blocks, final norm and head, all of them by role.

``h = embed(ids)``; each block adds its halves to h; ``logits = head(norm(h))``. The description is complete for a
planner's counts, the names in a GGUF file and a serving engine. The tests hold a plain interpreter that computes a
model's logits from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from veneer.model.blueprint.parts import Attention, Experts, FeedForward, KeepsState, Linear, Norm, Strange


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Table of learned positions, (rows, width): position p is row p + ``offset`` (OPT: 2)."""

    path: str
    rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Embedding ``norm(multiplier · table[ids] + positions)``; the table is (n_tokens, width).

    ``own_multiplier`` is the part of ``multiplier`` that the table's module itself applies to its output (Gemma).
    Inputs given instead of token ids are not multiplied by it.
    """

    path: str
    n_tokens: int
    width: int
    multiplier: float = 1.0
    own_multiplier: float = 1.0
    positions: Positions | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNorms:
    """Norms of a block's two halves, attention and feed-forward: before each half, and after it (``post``), if there
    are any.
    """

    attention: Norm | None
    feed_forward: Norm | None
    attention_post: Norm | None = None
    feed_forward_post: Norm | None = None

    @property
    def all(self) -> tuple[Norm, ...]:
        """The norms, each once. Both halves of a parallel block may share one."""
        norms = (self.attention, self.feed_forward, self.attention_post, self.feed_forward_post)
        return tuple(dict.fromkeys(norm for norm in norms if norm is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """Place of a bottleneck adapter at one half of a block.

    ``input_path`` is the module whose first input is the half's input, after a norm that precedes it. ``output_path``
    is the module whose first output is added to the residual stream; a norm that follows the half is included.
    """

    input_path: str
    output_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Block ``h += m · post(attention(norm(h)))``, then ``h += m · post(feed_forward(norm(h)))``.

    m is ``residual_multiplier``. ``parallel``: the feed-forward half reads the attention half's input. ``returns``: the
    number of values in the tuple that the block's forward returns, the residual stream first; None if it returns the
    stream alone.
    """

    path: str
    attention: Attention | KeepsState | Strange
    feed_forward: FeedForward | Experts | Strange
    norms: BlockNorms
    parallel: bool
    residual_multiplier: float
    attention_sublayer: Sublayer | None
    feed_forward_sublayer: Sublayer | None
    other: tuple[Strange, ...] = ()
    returns: int | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the block, in the order in which they run."""
        halves = (half for half in (self.attention, self.feed_forward) if not isinstance(half, Strange))
        return tuple(linear for half in halves for linear in half.linears)

    @property
    def strange(self) -> tuple[Strange, ...]:
        """The parts of the block that the description cannot express."""
        halves = (half for half in (self.attention, self.feed_forward) if isinstance(half, Strange))
        return tuple(dict.fromkeys((*halves, *self.other)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Output head ``softcap(scale · linear(x))``. ``tied``: its weight is the embeddings' table."""

    linear: Linear
    tied: bool
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Description of a decoder.

    ``listed``: this package's tests have compared outputs computed from the description with the model's own, for this
    model type. The description of any other type follows the convention of names, and callers must check it before they
    use it to compute. ``head`` is None if the model is for another task. ``other`` holds parts outside the blocks that
    the description cannot express.
    """

    model_type: str
    listed: bool
    embedding: Embedding
    blocks: tuple[Block, ...]
    norm: Norm | None
    head: Head | None
    other: tuple[Strange, ...] = ()

    @property
    def linears(self) -> Iterator[Linear]:
        """Linear layers of the decoder, the head last. Stacks of experts are not included."""
        for block in self.blocks:
            yield from block.linears
        if self.head is not None:
            yield self.head.linear

    @property
    def norms(self) -> Iterator[Norm]:
        """Norms of the decoder."""
        ends = (self.embedding.norm, *(n for b in self.blocks for n in (*b.norms.all, *_head_norms(b))), self.norm)
        return (norm for norm in ends if norm is not None)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention of every block that has it, if it is described."""
        return tuple(block.attention for block in self.blocks if isinstance(block.attention, Attention))

    @property
    def strange(self) -> tuple[Strange, ...]:
        """The parts of the model that the description cannot express; empty if it is complete."""
        return (*self.other, *(part for block in self.blocks for part in block.strange))


def _head_norms(block: Block) -> tuple[Norm, ...]:
    return block.attention.norms if isinstance(block.attention, Attention) else ()
