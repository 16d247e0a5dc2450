"""Step in C++: the instructions of a program that it supports, and passes through stretches of them, one call each.

It calls the same kernels as the ops, on the same weights, so it gives the same bits as the instructions one by one.
Parts of a model, or of the versions in a pass, may be unsupported. `bound` instructions run these between the
stretches, on the same registers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import ShapeError
from veneer.model.blueprint.rotary import Rotary
from veneer.ops.activation import KINDS
from veneer.ops.attention import AttentionOptions
from veneer.ops.cpu.step import ProductChange, StepAttention, StepLayer, StepProgram, StepRows, StepTurns, places
from veneer.ops.glu import ACTIVATIONS as GATED
from veneer.serve.program.block import VersionBlock
from veneer.serve.program.block_layout import BlockLayout
from veneer.serve.program.bottleneck import Bottleneck
from veneer.serve.program.bound import (
    LISTS,
    Activated,
    Added,
    Bound,
    BoundEmbedding,
    Changed,
    Frame,
    IntoStreamOf,
    LogitsOf,
    Normed,
    Picked,
    Products,
    SelfAttention,
)
from veneer.serve.program.effects import Effects
from veneer.serve.program.kv_cache import PageCache
from veneer.serve.program.native_parts import Register, heads_at, is_plain, norm_of
from veneer.serve.program.norms import BoundNorm
from veneer.serve.program.products import Linears
from veneer.serve.program.program import STREAM
from veneer.serve.program.step import PassRows


class Adapter(NamedTuple):
    """Parts of a version beside its block; ``paths`` have its own parameters or rows."""

    effects: Effects
    bottlenecks: Mapping[str, Bottleneck]
    paths: frozenset[str]

    @property
    def is_empty(self) -> bool:
        """True if its block is all that it has."""
        return not self.bottlenecks and not self.paths and self.effects.table is None


@dataclass(frozen=True, slots=True)
class NativePart:
    """Bound instruction in C++: its place there, its registers, and the versions that it does not support.

    Those versions change a parameter or rows at its ``fixed`` paths, or the layer ``fixed_layer``. A version's own
    ``norm`` is supported. Its instruction ``site_at`` applies the bottlenecks of its ``site``.
    """

    place: range
    reads: tuple[Register, ...] = ()
    writes: tuple[Register, ...] = ()
    unknown: set[str] = field(default_factory=set)
    linears: Linears | None = None
    norm: BoundNorm | None = None
    fixed: tuple[str, ...] = ()
    fixed_layer: Linears | None = None
    embeds: bool = False
    site: str = ""
    site_at: int = 0

    def change(self, block: VersionBlock) -> ProductChange | None:
        """Return what a block changes at its product; None if it changes nothing, or is not supported."""
        found = None if self.linears is None else block.change(self.linears.number)
        if found is None or found.step is None:
            return None
        return ProductChange(self.place.start, found.own.pairs, found.step)

    def is_unknown(self, layout: BlockLayout) -> bool:
        """Return True if it does not support what versions of a layout change at its linear layers."""
        product = None if self.linears is None else layout.changes[self.linears.number]
        fixed = None if self.fixed_layer is None else layout.changes[self.fixed_layer.number]
        return fixed is not None or (product is not None and product.step is None)

    def take(self, program: StepProgram, version: str, number: int, adapter: Adapter) -> None:
        """Add what a version changes beside its block."""
        instead = None if self.norm is None else self.norm.instead(adapter.effects)
        norm = None if self.norm is None or instead is None else norm_of(self.norm, instead)
        if norm is not None:
            program.take_norm(number, self.place.start, norm)
        elif instead is not None:
            self.unknown.add(version)
        bottleneck = adapter.bottlenecks.get(self.site)
        if bottleneck is not None and bottleneck.pairs is not None:
            at = self.place.start + self.site_at
            program.take_bottleneck(number, at, bottleneck.pairs, reads_output=bottleneck.reads_output)
        elif bottleneck is not None or self._is_changed(adapter):
            self.unknown.add(version)

    def _is_changed(self, adapter: Adapter) -> bool:
        return (self.embeds and adapter.effects.table is not None) or not adapter.paths.isdisjoint(self.fixed)


@dataclass(eq=False, slots=True)
class _Layout:
    """Layout in C++: its number there, the parts that do not support its versions, and the versions that have it."""

    number: int
    unknown: list[NativePart]
    versions: set[str] = field(default_factory=set)


class _Numbers:
    """Numbers, the least that is free first."""

    def __init__(self) -> None:
        self._n, self._unused = 0, list[int]()  # a heap

    def take(self) -> int:
        if self._unused:
            return heapq.heappop(self._unused)
        self._n += 1
        return self._n - 1

    def give_back(self, number: int) -> None:
        heapq.heappush(self._unused, number)


class NativeStep:
    """Parts of a program in C++, one for each bound instruction, or None if it is not supported."""

    def __init__(self, width: int, dtype: torch.dtype, turns: Mapping[Rotary, tuple[Tensor, Tensor]]) -> None:
        tables = [(cos.float().contiguous(), sin.float().contiguous()) for cos, sin in turns.values()]
        self.program, self.rotaries = StepProgram(dtype, tables), tuple(turns)
        self.stream = Register(STREAM, (width,))
        self.parts: list[NativePart | None] = []
        self.numbers: dict[str, int] = {}
        self._free, self._free_layouts = _Numbers(), _Numbers()
        self._layouts: dict[BlockLayout, _Layout] = {}
        self._taken: dict[str, BlockLayout] = {}
        self.partly: set[str] = set()
        """The versions that some part does not know."""
        self.n_registers, self.n_moves = 0, 0  # moves: of the memory of registers
        self._first: dict[Register, int] = {}
        self._memory: dict[Register, Tensor] = {}

    def add(self, bound: Bound) -> None:
        """Add the next instruction of the program."""
        before = self.program.n_instructions
        part = self._part_of(bound)
        place = range(before, self.program.n_instructions)
        self.parts.append(None if part is None else replace(part, place=place))

    def take(self, version: str, block: VersionBlock, effects: Effects, bottlenecks: Mapping[str, Bottleneck]) -> None:
        """Add an adapter version. Its block must stay until it is dropped."""
        number = self.numbers[version] = self._free.take()
        self._taken[version] = block.layout
        layout = self._layout_of(block)
        layout.versions.add(version)
        self.program.take(number, layout.number, block.memory)
        for part in layout.unknown:
            part.unknown.add(version)
        adapter = Adapter(effects, bottlenecks, frozenset({path for path, _ in effects.whole} | effects.rows.keys()))
        parts = [] if adapter.is_empty else [part for part in self.parts if part is not None]
        for part in parts:
            part.take(self.program, version, number, adapter)
        if layout.unknown or any(version in part.unknown for part in parts):
            self.partly.add(version)

    def drop(self, version: str) -> None:
        """Drop an adapter version, if it is known."""
        if version in self.numbers:
            number = self.numbers.pop(version)
            self.program.drop(number)
            self._free.give_back(number)
        layout = self._taken.pop(version, None)
        if layout is not None:
            self._give_back(layout, version)
        self.partly.discard(version)
        for part in self.parts:
            if part is not None:
                part.unknown.discard(version)

    def _layout_of(self, block: VersionBlock) -> _Layout:
        """The layout of a block in C++, found when the first version comes that has it."""
        if block.layout not in self._layouts:
            parts = [part for part in self.parts if part is not None]
            changes = [change for part in parts if (change := part.change(block)) is not None]
            found = _Layout(self._free_layouts.take(), [part for part in parts if part.is_unknown(block.layout)])
            self.program.add_layout(found.number, changes, block.memory)
            self._layouts[block.layout] = found
        return self._layouts[block.layout]

    def _give_back(self, layout: BlockLayout, version: str) -> None:
        """Forget a layout with the last version that has it."""
        found = self._layouts.get(layout)
        if found is None:
            return
        found.versions.discard(version)
        if not found.versions:
            del self._layouts[layout]
            self.program.drop_layout(found.number)
            self._free_layouts.give_back(found.number)

    def first_of(self, register: Register) -> int:
        """Return the number of a register's first tensor."""
        if register not in self._first:
            self._first[register] = self.n_registers
            self.n_registers += len(register.widths)
        return self._first[register]

    def rows_of(self, register: Register, n: int) -> list[Tensor]:
        """Return memory for n rows of a register, its tensors as adjacent columns; the same memory in every pass."""
        held = self._memory.get(register)
        if held is None or len(held) < n:
            held = torch.empty(n, sum(register.widths), dtype=self.program.dtype)
            self._memory[register] = held
            self.n_moves += 1
        return list(torch.split(held[:n], list(register.widths), dim=1))

    def _part_of(self, bound: Bound) -> NativePart | None:
        match bound:
            case BoundEmbedding():
                return self._embedding(bound)
            case Normed(norm, source, target):
                return self._norm(norm, source, target)
            case Products(linears, instruction):
                return self._product(linears, instruction.source, instruction.target)
            case IntoStreamOf():
                return self._into_stream(bound)
            case SelfAttention():
                return self._attention(bound)
            case Activated():
                return self._activation(bound)
            case Changed(instruction, _):
                return self._change(instruction.site, instruction.source, instruction.target)
            case Added(instruction):
                return self._sum(instruction.source, instruction.multiplier)
            case Picked(logits):
                return self._head(logits)
        return None

    def _embedding(self, bound: BoundEmbedding) -> NativePart | None:
        plain = bound.positions is None and bound.norm is None
        if not plain or bound.table.dtype != self.program.dtype or not bound.table.is_contiguous():
            return None
        multipliers = [each for each in (bound.own_multiplier, bound.multiplier) if each != 1]
        self.program.add_embedding(bound.table, multipliers, self.first_of(self.stream))
        return NativePart(range(0), (), (self.stream,), fixed=(bound.path,), embeds=True)

    def _norm(self, bound: BoundNorm, source: str, target: str) -> NativePart | None:
        norm = norm_of(bound)
        if norm is None:
            return None
        reads, writes = Register(source, bound.norm.shape), Register(target, bound.norm.shape)
        self.program.add_norm(norm, self.first_of(reads), self.first_of(writes))
        return NativePart(range(0), (reads,), (writes,), norm=bound)

    def _product(
        self, linears: Linears, source: str, target: str, stream: int = -1, beside: int = -1
    ) -> NativePart | None:
        group = linears.group
        if group is None or any(part.dtype != self.program.dtype for part in group.parts):
            return None
        if any(bias is not None and bias.dtype != self.program.dtype for bias in linears.biases):
            return None
        reads, writes = Register(source, (group.parts[0].shape[1],)), Register(target, tuple(group.heights))
        first = self.first_of(writes)
        layers = [StepLayer(w, b, first + i) for i, (w, b) in enumerate(zip(group.parts, linears.biases, strict=True))]
        joined = None if group.whole is None else (group.whole, linears.bias)
        self.program.add_product(layers, self.first_of(reads), joined=joined, stream=stream, beside=beside)
        return NativePart(range(0), (reads,), (writes,), linears=linears)

    def _head(self, logits: LogitsOf) -> NativePart | None:
        group, norm, head = logits.linears.group, logits.norm, logits.head
        own = None if norm is None else norm_of(norm)
        [bias] = logits.linears.biases
        if group is None or not head.scale > 0 or (norm is not None and own is None):
            return None
        if group.parts[0].dtype != self.program.dtype or (bias is not None and bias.dtype != self.program.dtype):
            return None
        self.program.add_head(own, StepLayer(group.parts[0], bias, -1), self.first_of(self.stream), head.scale)
        return NativePart(range(0), (self.stream,), norm=norm, fixed=(head.linear.path,), fixed_layer=logits.linears)

    def _into_stream(self, bound: IntoStreamOf) -> NativePart | None:
        beside = Register(bound.beside, self.stream.widths)
        if bound.linears.adds():
            stream = self.first_of(self.stream)
            part = self._product(bound.linears, bound.source, "half", stream, self.first_of(beside))
            if part is None:
                return None
            return replace(part, reads=(*part.reads, beside, self.stream), writes=(self.stream,), site=bound.site)
        part = self._product(bound.linears, bound.source, "half")
        if part is None:
            return None
        change, total = self._change(bound.site, bound.beside, "half"), self._sum("half", 1.0)
        return replace(
            part,
            reads=(*part.reads, *change.reads[:1], self.stream),
            writes=(*part.writes, *total.writes),
            site=bound.site,
            site_at=1,
        )

    def _change(self, site: str, source: str, target: str) -> NativePart:
        reads, half = Register(source, self.stream.widths), Register(target, self.stream.widths)
        self.program.add_change(half.widths[0], self.first_of(reads), self.first_of(half))
        return NativePart(range(0), (reads, half), (half,), site=site)

    def _sum(self, source: str, multiplier: float) -> NativePart:
        half = Register(source, self.stream.widths)
        self.program.add_sum(half.widths[0], multiplier, self.first_of(half), self.first_of(self.stream))
        return NativePart(range(0), (half, self.stream), (self.stream,))

    def _attention(self, bound: SelfAttention) -> NativePart | None:
        part, heads = bound.part, bound.part.heads
        q_norm, k_norm = (None if norm is None else norm_of(norm) for norm in (bound.heads.q_norm, bound.heads.k_norm))
        if not is_plain(part):
            return None
        reads = Register(bound.heads.instruction.source, tuple(linear.out_features for linear in part.qkv))
        writes = Register(bound.attended.instruction.target, (heads.n_heads * heads.head_dim,))
        self.program.add_attention(
            StepAttention(
                layer=bound.heads.instruction.layer,
                heads=(heads.n_heads, heads.n_kv_heads, heads.head_dim),
                places=heads_at(heads, self.first_of(reads)),
                norms=(q_norm, k_norm),
                turns=None if part.rotary is None else self._turns(part.rotary),
                options=AttentionOptions(scale=part.scale, window=part.window, softcap=part.softcap),
                target=self.first_of(writes),
            )
        )
        return NativePart(range(0), (reads,), (writes,))

    def _turns(self, rotary: Rotary) -> StepTurns:
        return StepTurns(self.rotaries.index(rotary), -(-rotary.dim // 2), rotary.interleaved)

    def _activation(self, bound: Activated) -> NativePart | None:
        part = bound.instruction.part
        reads = Register(bound.instruction.source, tuple(linear.out_features for linear in part.inner))
        writes = Register(bound.instruction.target, (part.width,))
        if not part.gated and part.activation in KINDS:
            self.program.add_activation(part.activation, part.width, self.first_of(reads), self.first_of(writes))
            return NativePart(range(0), (reads,), (writes,))
        if not part.gated or part.activation not in GATED:
            return None
        gate = self.first_of(reads)
        up = (gate + 1, 0) if len(part.inner) == 2 else (gate, part.width)
        self.program.add_glu(part.activation, part.width, gate, up, self.first_of(writes))
        return NativePart(range(0), (reads,), (writes,))

    def stretches(self, instructions: Sequence[Bound], step: PassRows, *, by_ids: bool) -> Iterator[Bound]:
        """Return the instructions of a pass: supported ones joined, the others unchanged."""
        in_pages = isinstance(step.cache, PageCache) and step.written is None
        found: list[NativePart] = []
        for part, bound in zip(self.parts, instructions, strict=True):
            known = part is not None and part.unknown.isdisjoint(step.versions)
            fits = (in_pages or not isinstance(bound, SelfAttention)) and (
                by_ids or not isinstance(bound, BoundEmbedding)
            )
            if part is not None and known and fits:
                found.append(part)
                continue
            if found:
                yield NativeStretch(self, found)
            yield bound
            found = []
        if found:
            yield NativeStretch(self, found)


class NativeStretch:
    """Consecutive parts, run by one call."""

    def __init__(self, native: NativeStep, parts: Sequence[NativePart]) -> None:
        self.native = native
        self.place = range(parts[0].place.start, parts[-1].place.stop)
        self.reads, self.writes = dict[Register, None](), dict[Register, None]()
        for part in parts:
            self.reads |= {each: None for each in part.reads if each not in self.writes}
            for each in part.writes:  # those written last stand last
                self.writes.pop(each, None)
                self.writes[each] = None
        self._laid = (-1, -1)
        self._numbers: list[int] = []
        self._written: dict[Register, Any] = {}

    def __call__(self, step: PassRows, frame: Frame) -> None:
        if not self.place:
            return
        native, given = self.native, frame["given"]
        pages = (step.cache.store, step.rows) if isinstance(step.cache, PageCache) else None
        runs = [(native.numbers[step.versions[place]], start, stop) for place, start, stop in step.runs.runs]
        registers = self._registers(frame, len(step.positions))
        ids = None if given.is_floating_point() else given
        native.program.run(self.place, registers, pages, StepRows(step.positions, ids, step.picked, step.tokens), runs)

    def _registers(self, frame: Frame, n: int) -> list[int]:
        """The places of all registers, n rows each; the frame then has what will be written.

        Raises ShapeError where an instruction before has left other rows.
        """
        if self._laid != (n, self.native.n_moves):
            self._lay(n)
        given = {register: self._given(frame, register, n) for register in self.reads}
        for register, rows in given.items():
            first = 2 * self.native.first_of(register)
            self._numbers[first : first + 2 * len(rows)] = places(rows)
        for register in self.writes:  # of one name those written last stand last
            rows = given.get(register) or self._written[register]
            frame[register.name] = rows if register.name in LISTS else rows[0]
        return self._numbers

    def _lay(self, n: int) -> None:
        """Find the places of what is written and was not read before: they are the same in every pass of n rows."""
        native = self.native
        self._numbers, self._written = [0] * (2 * native.n_registers), {}
        for register in self.writes:
            if register not in self.reads:
                rows, first = native.rows_of(register, n), 2 * native.first_of(register)
                self._numbers[first : first + 2 * len(rows)] = places(rows)
                self._written[register] = rows
        self._laid = (n, native.n_moves)

    def _given(self, frame: Frame, register: Register, n: int) -> list[Tensor]:
        """Tensors of rows whose last axis is contiguous, looked at before C++ reads their memory."""
        given, dtype = frame[register.name], self.native.program.dtype
        rows = [given] if isinstance(given, Tensor) else list(given)
        for x, width in zip(rows, register.widths, strict=True):
            if x.shape != (n, width) or x.dtype != dtype:
                raise ShapeError(
                    f"register {register.name!r} holds {tuple(x.shape)} in {_said(x.dtype)}, and a step takes "
                    f"({n}, {width}) in {_said(dtype)}"
                )
        return [x if x.stride(1) == 1 else x.contiguous() for x in rows]


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
