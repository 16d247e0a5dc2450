"""Decoder's program by csrc/step: instructions on packed weights that one call runs through.

Instructions read and write registers, which have numbers; a pass says where each lies. The program keeps the tensors
that it reads alive. One pass at a time.
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
from veneer.ops.packed_codes import CODINGS, PackedCodes
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.pairs import PackedPairs


@dataclass(frozen=True, slots=True)
class StepNorm:
    """Norm's float32 weight, any offset added, and bias; ``subtracts_mean`` makes it a LayerNorm."""

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
    """Queries, keys or values: their register, the first value in it, and the values from head to head."""

    source: int
    first: int
    apart: int


class StepTurns(NamedTuple):
    """Rotation of heads: the number of its tables, the pairs that turn, and whether neighbours are a pair."""

    table: int
    half: int
    interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAttention:
    """``layer``: of the pages; ``heads``: of queries, of keys, and values of one; ``places`` of q, k and v."""

    layer: int
    heads: tuple[int, int, int]
    places: tuple[StepHeads, StepHeads, StepHeads]
    norms: tuple[StepNorm | None, StepNorm | None]
    turns: StepTurns | None
    options: AttentionOptions
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """Change that a version makes at one layer: scales and bias in float32, ``whole`` in the place of its weight, a
    pair that reads the scaled input. ``own_bias`` is the bias in the rows' dtype.
    """

    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None
    whole: PackedWeight | None = None
    pair: PackedPairs | None = None


class StepRows(NamedTuple):
    """Of each row its position, and its token's id where tokens are embedded; the rows whose likeliest token is asked
    for, and what takes these tokens. All int64.
    """

    positions: Tensor
    ids: Tensor | None
    picked: Tensor
    tokens: Tensor


class StepProgram:
    """Instructions in their order; versions of adapters, which have numbers, come and go at its products.

    ``turns`` are cosines and sines (n_positions, half) of each rotation, in float32. It is freed when the interpreter
    exits, whoever holds it: a thread that others left running, say.
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
        """``target`` takes the rows of a table (vocabulary, width) that the ids tell, times one multiplier after the
        other, rounded each time.
        """
        self._program.add_embedding(address(table), *table.shape, list(multipliers), target)
        self._kept.append(table)
        self.n_instructions += 1

    def add_norm(self, norm: StepNorm, source: int, target: int) -> None:
        """``target = norm(source)``, one row behind the other; may be one register."""
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
        """Return the outputs of layers that read ``source``; the one layer's is added to ``stream`` where that is
        given, and changed on its way by bottlenecks, which read it or ``beside``.

        ``joined``: weight and bias of all layers, for outputs that lie side by side.
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
        """Return the likeliest tokens behind the rows that are picked: ``scale``, which is positive, times the head's
        product with ``norm(source)``.
        """
        outputs = head.weight.shape[0] + -head.weight.shape[0] % BLOCK
        numbers = _layer(head, None)  # of its bias the step reads the rows' dtype alone
        self._program.add_head(_norm(norm), numbers, head.weight.nbytes // outputs, source, scale)
        self._kept.append(head)
        self.n_instructions += 1

    def add_attention(self, part: StepAttention) -> None:
        """Heads normed, turned, appended to the pages, and what the queries see."""
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
        """``target = act(gate) * up``; ``up`` is a register and the first value in it."""
        self._program.add_glu(ACTIVATIONS.index(activation), d, gate, *up, target)
        self.n_instructions += 1

    def add_activation(self, activation: str, d: int, source: int, target: int) -> None:
        """``target = act(source)``."""
        self._program.add_activation(KINDS.index(activation), d, source, target)
        self.n_instructions += 1

    def add_change(self, d: int, source: int, target: int) -> None:
        """Bottlenecks of versions at a half's output ``target``, whose input is ``source``."""
        self._program.add_change(d, source, target)
        self.n_instructions += 1

    def add_sum(self, d: int, multiplier: float, source: int, stream: int) -> None:
        """``stream += multiplier * source``."""
        self._program.add_sum(d, multiplier, source, stream)
        self.n_instructions += 1

    def take(self, version: int, instruction: int, pairs: PackedPairs | None, changes: Sequence[LayerChange]) -> None:
        """Return a version comes at a product: low-rank pairs of all layers at once; ``changes``: more at
        each, or empty.
        """
        self._program.take(instruction, version, _pairs(pairs), [_change(change) for change in changes])
        self._of_versions[version].append((pairs, list(changes)))

    def take_bottleneck(self, version: int, instruction: int, pairs: PackedPairs, *, reads_output: bool) -> None:
        """Return a version comes with a bottleneck, at a product that goes into the stream, or at `add_change`."""
        self._program.take_bottleneck(instruction, version, _pairs(pairs), reads_output)
        self._of_versions[version].append(pairs)

    def take_norm(self, version: int, instruction: int, norm: StepNorm) -> None:
        """Return a version comes with a norm of its own, at a norm or the head."""
        self._program.take_norm(instruction, version, _norm(norm))

    def seconds(self) -> list[float]:
        """Return the seconds that each instruction has taken since they were asked for last."""
        return list(self._program.seconds())

    def drop(self, version: int) -> None:
        """Return a version goes."""
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
        """Run some instructions. ``registers`` are the `places` of tensors (n, width), ``runs`` versions with their
        first row and the row behind their last. Raises IndexError for an id that is not in a table of embeddings, or
        a position that has no turns.
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
    """Address and stride of each."""
    return [number for register in registers for number in (address(register), register.stride(0))]


def _pages(store: PagedStore, rows: PagedRows) -> tuple[list[int], list[int]]:
    tables = (rows.pages, rows.first_page, rows.first_row, rows.position)
    sizes = [address(store.data), store.block, store.n_layers, store.kv_heads, store.head_dim]
    return sizes, [len(rows.position), *map(address, tables)]


def _at(x: Tensor | None) -> int:
    return 0 if x is None else address(x)


def _coding(weight: PackedWeight | PackedCodes) -> tuple[int, int]:
    return (CODINGS.index(weight.coding), weight.unit) if isinstance(weight, PackedCodes) else (0, 0)


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
        *_pairs(change.pair),
    ]


def _pairs(pairs: PackedPairs | None) -> list[int]:
    return [] if pairs is None else [address(pairs.factors), *pairs.numbers, *pairs.ranks]
