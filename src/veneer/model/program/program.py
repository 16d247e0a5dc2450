"""Program of a decoder: its operations in order, compiled from its description, as plain data.

The operations read and write named registers: the residual stream ``h`` of all rows (n, width), and the values that
pass between the operations of a half block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from veneer.errors import DescriptionError
from veneer.model.blueprint.alibi import Alibi
from veneer.model.blueprint.decoder import Decoder, Embedding, Head
from veneer.model.blueprint.parts import Attention, Linear, Norm, Stack
from veneer.model.blueprint.rotary import DynamicScaling, LongRopeScaling, Rotary
from veneer.model.program.embed import Embed
from veneer.model.program.halves import block_operations
from veneer.model.program.logits import Logits, Pick
from veneer.model.program.norm import Normalize
from veneer.model.program.operation import STREAM, Keys, Operation, PageState, Register, Window


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
        """The keys and values that each layer of attention stores for a token."""
        return tuple(each.state for each in self.operations if isinstance(each.state, Keys))

    @property
    def windows(self) -> tuple[Window, ...]:
        """The values that each short convolution stores for a token."""
        return tuple(each.state for each in self.operations if isinstance(each.state, Window))

    @property
    def page_states(self) -> tuple[PageState, ...]:
        """The state that each scan stores for a page."""
        return tuple(each.state for each in self.operations if isinstance(each.state, PageState))

    @property
    def numbers_per_position(self) -> int:
        """Number of values that all operations together store for a token."""
        return sum(state.n_numbers for state in self.states) + sum(window.n_numbers for window in self.windows)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Different rotations of queries and keys."""
        return tuple(dict.fromkeys(part.rotary for part in self.attentions if part.rotary is not None))

    @property
    def alibis(self) -> tuple[Alibi, ...]:
        """Biases by position, each once."""
        return tuple(dict.fromkeys(part.alibi for part in self.attentions if part.alibi is not None))

    @property
    def groups(self) -> tuple[tuple[Linear, ...], ...]:
        """Linear layers that read the same input, in the order in which they run."""
        return tuple(dict.fromkeys(each.layers for each in self.operations if each.layers))

    @property
    def stacks(self) -> tuple[tuple[Stack, ...], ...]:
        """Layers of all experts of a mixture, by mixture."""
        return tuple(each.stacks for each in self.operations if each.stacks)

    @cached_property
    def stack_paths(self) -> frozenset[str]:
        """Paths of the layers of all experts."""
        return frozenset(stack.path for stacks in self.stacks for stack in stacks)

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
        """The sub-layers after which bottlenecks can act."""
        return frozenset(each.site for each in self.operations if each.site)

    @cached_property
    def text_half(self) -> list[str]:
        """Names on the path of the module that holds the embedding and all layers but the head."""
        paths = (self.embedding.path, *(path for path in self.linears if path != self.head.linear.path))
        by_depth = zip(*(path.split(".") for path in paths), strict=False)
        return [names[0] for names in takewhile(lambda names: len(set(names)) == 1, by_depth)]

    def reads_tokens(self, path: str) -> bool:
        """Return True if a module is the head or in the text half of its model, which may read images too."""
        return path == self.head.linear.path or path.split(".")[: len(self.text_half)] == self.text_half


def compile_program(decoder: Decoder, n_positions: int) -> Program:
    """Return the program of a decoder, for sequences of at most ``n_positions``.

    Raises DescriptionError, which names each part for which there is no operation.
    """
    reason = next(_unsaid(decoder, n_positions), None)
    if reason is not None or decoder.head is None:
        raise DescriptionError(reason or "it has no output head")
    stream, head, of_embedding = Register(STREAM, (decoder.embedding.width,)), decoder.head, decoder.embedding.norm
    operations = (
        Embed(embedding=decoder.embedding, target=stream),
        *([] if of_embedding is None else [Normalize(norm=of_embedding, source=stream, target=stream)]),
        *_block_operations(decoder, stream),
        Pick(norm=decoder.norm, head=head, stream=stream),
        Logits(norm=decoder.norm, head=head, stream=stream),
    )
    return Program(operations, n_positions, decoder.embedding, head, decoder.attentions)


def _block_operations(decoder: Decoder, stream: Register) -> Iterator[Operation]:
    """Yield the operations of all blocks. Blocks of one kind of attention or state are numbered from 0, each kind by
    itself.
    """
    n_of = dict[type, int]()
    for block in decoder.blocks:
        kind = type(block.attention)
        yield from block_operations(n_of.setdefault(kind, 0), block, stream)
        n_of[kind] += 1


def _unsaid(decoder: Decoder, n_positions: int) -> Iterator[str]:
    """Yield, for each part of the decoder that a program cannot express, its path and the reason. Some reasons hold
    only for sequences of ``n_positions`` tokens.
    """
    yield from (f"{part.path}: {part.reason}" for part in decoder.strange)
    positions = decoder.embedding.positions
    if positions is not None and n_positions + positions.offset > positions.rows:
        yield f"{positions.path} has {positions.rows} positions, and sequences may have {n_positions}"
    for part in decoder.attentions:
        scaling = None if part.rotary is None else part.rotary.scaling
        depends = isinstance(scaling, DynamicScaling | LongRopeScaling)
        if part.rotary is not None and depends and n_positions > _original(part.rotary):
            yield (
                f"the rotary frequencies of {part.path} depend on the length of a sequence beyond "
                f"{_original(part.rotary)} tokens: set max_model_len to that"
            )


def _original(rotary: Rotary) -> int:
    """Return the context length up to which frequencies do not depend on the sequence's length."""
    scaling = rotary.scaling
    return scaling.original_max_positions if isinstance(scaling, LongRopeScaling) else rotary.max_positions
