"""Decoder's program by csrc/step: instructions on packed weights, run by one call.

Instructions read and write numbered registers; each pass gives their addresses. The program keeps the tensors that it
reads alive. One pass runs at a time.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.ops.activation import KINDS
from veneer.ops.attention import AttentionOptions
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.glu import ACTIVATIONS
from veneer.ops.memory import address
from veneer.ops.packed import BLOCK, PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.pairs import PackedPairs
from veneer.ops.terms import TERM_KINDS, LayerTerms, PackedTerm

_ADD = 2  # role of a term that is added, behind those of the input and the output


@dataclass(frozen=True, slots=True)
class StepNorm:
    """Float32 weight (any offset added) and bias of a norm; ``subtracts_mean`` makes it a LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    subtracts_mean: bool


class StepLayer(NamedTuple):
    """Layer of a product: its weight, its bias in the rows' dtype, and the register that it writes."""

    weight: PackedWeight | PackedCodes
    bias: Tensor | None
    target: int


class StepHeads(NamedTuple):
    """Queries, keys or values: their register, the index of the first value in it, and the stride between heads."""

    source: int
    first: int
    apart: int


class StepTurns(NamedTuple):
    """Rotation of heads: the index of its tables, the number of rotated pairs, and whether pairs are
    adjacent features.
    """

    table: int
    half: int
    interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAttention:
    """Attention of one layer over the pages.

    ``layer``: its index in the pages. ``heads``: query heads, key heads and head size. ``places``: those of q, k and v.
    """

    layer: int
    heads: tuple[int, int, int]
    places: tuple[StepHeads, StepHeads, StepHeads]
    norms: tuple[StepNorm | None, StepNorm | None]
    turns: StepTurns | None
    options: AttentionOptions
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """Change that a version makes to one layer: scales and bias in float32, a replaced weight, a pair, terms.

    ``whole`` replaces the weight. The pair reads the mapped input. ``own_bias`` is the bias in the rows' dtype.
    """

    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None
    whole: PackedWeight | None = None
    pair: PackedPairs | None = None
    terms: LayerTerms | None = None


class ProductChange(NamedTuple):
    """Change that a version makes to a product: low-rank pairs of all layers, and changes of each layer, or none."""

    instruction: int
    pairs: PackedPairs | None
    layers: Sequence[LayerChange]


class StepRows(NamedTuple):
    """Rows of a pass: positions, token ids if tokens are embedded, and greedy picks. All are int64.

    ``picked`` are the rows whose likeliest token is wanted; ``tokens`` receives these tokens.
    """

    positions: Tensor
    ids: Tensor | None
    picked: Tensor
    tokens: Tensor


class StepProgram:
    """Instructions in order; numbered adapter versions are added to its products and dropped again.

    ``turns`` are cosines and sines (n_positions, half) of each rotation, in float32. The program is freed when the
    interpreter exits, even if a thread that is still running refers to it.
    """

    def __init__(self, dtype: torch.dtype, turns: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.dtype, self.n_instructions = dtype, 0
        numbers = [number for cos, sin in turns for number in (address(cos), address(sin), *cos.shape[::-1])]
        self._held: list[Any] = [kernels().StepProgram(DTYPES[dtype], numbers)]
        weakref.finalize(self, self._held.clear)
        self._kept: list[Any] = [list(turns)]
        self._of_versions: defaultdict[int, list[Any]] = defaultdict(list)

    @property
    def _program(self) -> Any:
        return self._held[0]

    def add_embedding(self, table: Tensor, multipliers: Sequence[float], target: int) -> None:
        """Add ``target``: the ids' rows of a table (vocabulary, width), times each multiplier in turn,
        rounded each time.
        """
        self._program.add_embedding(address(table), *table.shape, list(multipliers), target)
        self._kept.append(table)
        self.n_instructions += 1

    def add_norm(self, norm: StepNorm, source: int, target: int) -> None:
        """Add ``target = norm(source)``, row by row; source and target may be one register."""
        self._program.add_norm(_norm(norm), source, target)
        self.n_instructions += 1

    def add_product(
        self,
        layers: Sequence[StepLayer],
        source: int,
        *,
        joined: tuple[PackedWeight | PackedCodes, Tensor | None] | None = None,
        stream: int = -1,
        beside: int = -1,
    ) -> None:
        """Add the outputs of layers that read ``source``.

        If ``stream`` is given, the output of the single layer is added to it. Bottlenecks change that output first.
        They read the output itself, or the register ``beside``. ``joined``: weight and bias of all layers, for
        contiguous outputs.
        """
        wide = [None if layer.bias is None else layer.bias.float() for layer in layers]
        numbers = [_layer(layer, floats) for layer, floats in zip(layers, wide, strict=True)]
        whole, bias = joined or (None, None)
        self._program.add_product(
            numbers, 0 if whole is None else address(whole.panels), _at(bias), source, stream, beside
        )
        self._kept.append((list(layers), joined))
        self.n_instructions += 1

    def add_head(self, norm: StepNorm | None, head: StepLayer, source: int, scale: float) -> None:
        """Add the likeliest token after each picked row, by ``scale`` times the head's product with ``norm(source)``.

        ``scale`` is positive.
        """
        outputs = head.weight.shape[0] + -head.weight.shape[0] % BLOCK
        numbers = _layer(head, None)  # of its bias the step reads the rows' dtype alone
        self._program.add_head(_norm(norm), numbers, head.weight.nbytes // outputs, source, scale)
        self._kept.append(head)
        self.n_instructions += 1

    def add_attention(self, part: StepAttention) -> None:
        """Add attention: heads are normed, rotated and appended to the pages, and queries attend to the pages."""
        options, turns = part.options, part.turns or StepTurns(-1, 0, False)
        self._program.add_attention(
            [part.layer, *part.heads, turns.half],
            [list(place) for place in part.places],
            *(_norm(norm) for norm in part.norms),
            turns.table,
            turns.interleaved,
            part.heads[2] ** -0.5 if options.scale is None else options.scale,
            options.window or 0,
            options.softcap or 0.0,
            part.target,
        )
        self.n_instructions += 1

    def add_glu(self, activation: str, d: int, gate: int, up: tuple[int, int], target: int) -> None:
        """Add ``target = act(gate) * up``; ``up`` is a register and the index of the first value in it."""
        self._program.add_glu(ACTIVATIONS.index(activation), d, gate, *up, target)
        self.n_instructions += 1

    def add_activation(self, activation: str, d: int, source: int, target: int) -> None:
        """Add ``target = act(source)``."""
        self._program.add_activation(KINDS.index(activation), d, source, target)
        self.n_instructions += 1

    def add_change(self, d: int, source: int, target: int) -> None:
        """Add the bottlenecks of versions on the output ``target`` of a half block with input ``source``."""
        self._program.add_change(d, source, target)
        self.n_instructions += 1

    def add_sum(self, d: int, multiplier: float, source: int, stream: int) -> None:
        """Add ``stream += multiplier * source``."""
        self._program.add_sum(d, multiplier, source, stream)
        self.n_instructions += 1

    def add_layout(self, layout: int, changes: Sequence[ProductChange], block: Tensor) -> None:
        """Add a numbered layout: what all versions change whose tensors lie in their blocks as those of ``changes`` do.

        ``block`` is the memory that these are parts of.
        """
        numbers = [
            (each.instruction, _pairs(each.pairs), [_change(layer) for layer in each.layers]) for each in changes
        ]
        self._program.add_layout(layout, address(block), numbers)

    def drop_layout(self, layout: int) -> None:
        """Drop a layout that no version has."""
        self._program.drop_layout(layout)

    def take(self, version: int, layout: int, block: Tensor) -> None:
        """Add a version with a layout and a block, which is kept."""
        self._program.take(version, layout, address(block))
        self._of_versions[version].append(block)

    def take_bottleneck(self, version: int, instruction: int, pairs: PackedPairs, *, reads_output: bool) -> None:
        """Add a version's bottleneck to a product that is added to the stream, or to `add_change`."""
        self._program.take_bottleneck(instruction, version, _pairs(pairs), reads_output)
        self._of_versions[version].append(pairs)

    def take_norm(self, version: int, instruction: int, norm: StepNorm) -> None:
        """Add a version's own norm to a norm or the head."""
        self._program.take_norm(instruction, version, _norm(norm))

    def seconds(self) -> list[float]:
        """Return the seconds that each instruction has taken since the last call."""
        return list(self._program.seconds())

    def drop(self, version: int) -> None:
        """Drop a version."""
        self._program.drop(version)
        self._of_versions.pop(version, None)

    def run(
        self,
        part: range,
        registers: list[int],
        pages: tuple[PagedStore, PagedRows] | None,
        rows: StepRows,
        runs: Sequence[tuple[int, int, int]],
    ) -> None:
        """Run some instructions.

        ``registers`` are the `places` of tensors (n, width). ``runs`` are versions with their first row and the row
        after their last. Raises IndexError for an id outside a table of embeddings, or a position outside the rotation
        tables.
        """
        store, batch = _pages(*pages) if pages else ([0] * 5, [0] * 5)
        self._program.run(
            part.start,
            part.stop,
            len(rows.positions),
            registers,
            store,
            batch,
            [number for run in runs for number in run],
            [address(rows.positions), _at(rows.ids), len(rows.picked), address(rows.picked), address(rows.tokens)],
        )


def places(registers: Sequence[Tensor]) -> list[int]:
    """Return the address and row stride of each register, in turn."""
    return [number for register in registers for number in (address(register), register.stride(0))]


def _pages(store: PagedStore, rows: PagedRows) -> tuple[list[int], list[int]]:
    tables = (rows.pages, rows.first_page, rows.first_row, rows.position)
    sizes = [address(store.data), store.block, store.n_layers, store.kv_heads, store.head_dim]
    return sizes, [len(rows.position), *map(address, tables)]


def _at(x: Tensor | None) -> int:
    return 0 if x is None else address(x)


def _coding(weight: PackedWeight | PackedCodes) -> tuple[int, int]:
    return (weight.coding_number, weight.unit) if isinstance(weight, PackedCodes) else (0, 0)


def _layer(layer: StepLayer, wide_bias: Tensor | None) -> list[int]:
    weight, bias, target = layer
    return [
        *weight.shape, weight.depth, address(weight.panels), _at(bias), _at(wide_bias), target, *_coding(weight)
    ]  # fmt: skip


def _norm(norm: StepNorm | None) -> tuple[bool, float, int, int, int]:
    """Its numbers; the values are copied."""
    if norm is None:
        return False, 0.0, 0, 0, 0
    return norm.subtracts_mean, norm.eps, norm.weight.numel(), address(norm.weight), _at(norm.bias)


def _change(change: LayerChange) -> list[int]:
    whole = change.whole
    return [
        _at(change.in_scale),
        _at(change.out_scale),
        _at(change.bias),
        _at(change.own_bias),
        0 if whole is None else address(whole.panels),
        *_terms(change.terms),
        *_pairs(change.pair),
    ]


def _terms(terms: LayerTerms | None) -> list[int]:
    """How many terms there are, and the numbers of each: role, kind, four sizes, addresses."""
    if terms is None:
        return [0]
    maps = [(role, term) for role, term in enumerate((terms.input, terms.output)) if term is not None]
    found = [*maps, *((_ADD, term) for term in terms.adds)]
    return [len(found), *(number for role, term in found for number in _term(role, term))]


def _term(role: int, term: PackedTerm) -> list[int]:
    sizes = [*term.sizes, 0, 0, 0, 0][:4]
    return [role, TERM_KINDS.index(term.kind), *sizes, address(term.values), _at(term.index)]


def _pairs(pairs: PackedPairs | None) -> list[int]:
    return [] if pairs is None else [address(pairs.factors), *pairs.numbers, *pairs.ranks]
