"""Decoder's step in C++: consecutive operations of a program run as one call, by the ops' kernels on the same weights.

So it gives the same bits as the operations one by one. If an operation, or an adapter version at it, is not supported,
that operation is run by ops between two calls, on the same registers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.errors import ShapeError
from veneer.model.blueprint.rotary import Rotary
from veneer.model.program.operation import Bound, Frame, PassKind, Register, StepPlace
from veneer.model.program.rows import PassRows
from veneer.ops.cpu.step import ProductChange, StepProgram, StepRows, places
from veneer.serve.program.block import PackedEffects, VersionBlock
from veneer.serve.program.block_layout import BlockLayout, GroupChange
from veneer.serve.program.kv_cache import PageCache

Call = Callable[[PassRows, Frame], None]


@dataclass(frozen=True, slots=True)
class NativePart:
    """Operation of a program in C++, with the range of its instructions (``place``).

    ``unknown`` are the adapter versions that the operation does not support.
    """

    bound: Bound
    place: range
    unknown: set[str] = field(default_factory=set)

    def change(self, block: VersionBlock) -> GroupChange | None:
        """Return the changes of a block at the operation's layers; None if there are none."""
        group = self.bound.operation.group(self.bound.weights)
        return None if group is None else block.change(group.number)

    def take(self, name: str, version: PackedEffects, program: StepProgram, number: int) -> None:
        """Add the changes of an adapter version that lie outside its block of memory.

        If the operation does not support the version, add its name to ``unknown``.
        """
        place = StepPlace(program, number, self.place.start)
        if not self.bound.operation.take(self.bound.weights, version, place):
            self.unknown.add(name)


@dataclass(eq=False, slots=True)
class _Layout:
    """Layout of adapters in C++: its number, the operations that do not support it, and the adapter versions that use
    it.
    """

    number: int
    unknown: list[NativePart] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


class _Numbers:
    """Free numbers, of which the least is taken first."""

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
    """Program in C++. ``parts`` has one `NativePart` for each operation, or None if the operation is not supported."""

    def __init__(self, dtype: torch.dtype, turns: Mapping[Rotary, tuple[Tensor, Tensor]]) -> None:
        tables = {rotary: (cos.float().contiguous(), sin.float().contiguous()) for rotary, (cos, sin) in turns.items()}
        self.program = StepProgram(dtype, tables)
        self.parts: list[NativePart | None] = []
        self.numbers: dict[str, int] = {}
        self._free, self._free_layouts = _Numbers(), _Numbers()
        self._layouts: dict[BlockLayout, _Layout] = {}
        self._taken: dict[str, BlockLayout] = {}
        self.partly: set[str] = set()
        """Adapter versions that at least one operation does not support."""
        self.n_moves = 0  # of the memory of registers
        self._memory: dict[Register, Tensor] = {}

    @property
    def known(self) -> list[NativePart]:
        """Parts that are supported."""
        return [part for part in self.parts if part is not None]

    def add(self, bound: Bound) -> None:
        """Add the next operation of the program."""
        before = self.program.n_instructions
        is_known = bound.operation.emit(bound.weights, self.program)
        self.parts.append(NativePart(bound, range(before, self.program.n_instructions)) if is_known else None)

    def take(self, name: str, version: PackedEffects) -> None:
        """Add an adapter version. The caller must keep the version's block of memory until the version is dropped."""
        number, block = self._free.take(), version.linears
        self.numbers[name] = number
        self._taken[name] = block.layout
        layout = self._layout_of(block)
        layout.versions.add(name)
        self.program.take(number, layout.number, block.memory)
        for part in layout.unknown:
            part.unknown.add(name)
        parts = [] if version.is_block else self.known
        for part in parts:
            part.take(name, version, self.program, number)
        if layout.unknown or any(name in part.unknown for part in parts):
            self.partly.add(name)

    def drop(self, name: str) -> None:
        """Drop an adapter version, if it is known."""
        if name in self.numbers:
            number = self.numbers.pop(name)
            self.program.drop(number)
            self._free.give_back(number)
        layout = self._taken.pop(name, None)
        if layout is not None:
            self._give_back(layout, name)
        self.partly.discard(name)
        for part in self.known:
            part.unknown.discard(name)

    def _layout_of(self, block: VersionBlock) -> _Layout:
        """Return the C++ layout of a block, created for the first version that uses it."""
        if block.layout not in self._layouts:
            found, changes = _Layout(self._free_layouts.take()), list[ProductChange]()
            for part, change in ((part, part.change(block)) for part in self.known):
                if change is not None and change.step is not None and part.bound.operation.takes_blocks:
                    changes.append(ProductChange(part.place.start, change.own.pairs, change.step))
                elif change is not None:
                    found.unknown.append(part)
            self.program.add_layout(found.number, changes, block.memory)
            self._layouts[block.layout] = found
        return self._layouts[block.layout]

    def _give_back(self, layout: BlockLayout, name: str) -> None:
        """Stop using a layout for an adapter version; forget it if no version uses it."""
        found = self._layouts.get(layout)
        if found is None:
            return
        found.versions.discard(name)
        if not found.versions:
            del self._layouts[layout]
            self.program.drop_layout(found.number)
            self._free_layouts.give_back(found.number)

    def rows_of(self, register: Register, n: int) -> list[Tensor]:
        """Return memory for n rows of a register, reused in every pass; its tensors are adjacent columns."""
        held = self._memory.get(register)
        if held is None or len(held) < n:
            held = torch.empty(n, sum(register.widths), dtype=self.program.dtype)
            self._memory[register] = held
            self.n_moves += 1
        return list(torch.split(held[:n], list(register.widths), dim=1))

    def stretches(self, bound: Sequence[Bound], rows: PassRows, *, by_ids: bool) -> Iterator[Call]:
        """Yield the calls of a pass: consecutive supported operations as one call, other operations unchanged."""
        kind = PassKind(in_pages=isinstance(rows.cache, PageCache) and rows.written is None, by_ids=by_ids)
        found: list[NativePart] = []
        for part, each in zip(self.parts, bound, strict=True):
            if part is not None and part.unknown.isdisjoint(rows.versions) and each.operation.fits(kind):
                found.append(part)
                continue
            if found:
                yield NativeStretch(self, found)
            yield each
            found = []
        if found:
            yield NativeStretch(self, found)


class NativeStretch:
    """Consecutive supported operations of a program, run by one call of C++."""

    def __init__(self, native: NativeStep, parts: Sequence[NativePart]) -> None:
        self.native = native
        self.place = range(parts[0].place.start, parts[-1].place.stop)
        self.reads, self.writes = dict[Register, None](), dict[Register, None]()
        for operation in (part.bound.operation for part in parts):
            self.reads |= {each: None for each in operation.reads if each not in self.writes}
            for each in operation.writes:  # those written last stand last
                self.writes.pop(each, None)
                self.writes[each] = None
        self._laid = (-1, -1)
        self._numbers: list[int] = []
        self._written: dict[Register, list[Tensor]] = {}

    def __call__(self, rows: PassRows, frame: Frame) -> None:
        if not self.place:
            return
        native, given = self.native, frame["given"]
        pages = (
            (rows.cache.store, rows.cache.windows, rows.cache.states, rows.rows)
            if isinstance(rows.cache, PageCache)
            else None
        )
        runs = [(native.numbers[rows.versions[place]], start, stop) for place, start, stop in rows.runs.runs]
        n = len(rows.positions)
        # Alive until C++ has read them: a register that is written under the same name replaces them in the frame.
        read = {register: self._given(frame, register, n) for register in self.reads}
        registers = self._registers(frame, n, read)
        ids = None if given.is_floating_point() else given
        native.program.run(self.place, registers, pages, StepRows(rows.positions, ids, rows.picked, rows.tokens), runs)

    def _registers(self, frame: Frame, n: int, read: dict[Register, list[Tensor]]) -> list[int]:
        """Return the addresses and strides of all registers, with n rows each, and store the written registers in
        ``frame``.

        Registers in ``read`` use the tensors given there. Memory is allocated for the others.
        """
        if self._laid != (n, self.native.n_moves):
            self._lay(n)
        for register, rows in read.items():
            self._place(register, rows)
        for register in self.writes:  # of one name those written last stand last
            register.write(frame, read.get(register) or self._written[register])
        return self._numbers

    def _place(self, register: Register, rows: list[Tensor]) -> None:
        first = 2 * self.native.program.first_of(register)
        self._numbers[first : first + 2 * len(rows)] = places(rows)

    def _lay(self, n: int) -> None:
        """Allocate the registers that are written before they are read. Passes of n rows reuse this memory."""
        self._numbers, self._written = [0] * (2 * self.native.program.n_tensors), {}
        for register in self.writes:
            if register not in self.reads:
                self._written[register] = self.native.rows_of(register, n)
                self._place(register, self._written[register])
        self._laid = (n, self.native.n_moves)

    def _given(self, frame: Frame, register: Register, n: int) -> list[Tensor]:
        """Return a register's tensors, with n rows and a contiguous last axis, before C++ reads their memory.

        Raises ShapeError if an earlier operation stored a tensor of another shape or dtype in the register.
        """
        rows, dtype = register.read(frame), self.native.program.dtype
        for x, width in zip(rows, register.widths, strict=True):
            if x.shape != (n, width) or x.dtype != dtype:
                raise ShapeError(
                    f"register {register.name!r} holds {tuple(x.shape)} in {_said(x.dtype)}, and a step takes "
                    f"({n}, {width}) in {_said(dtype)}"
                )
        return [x if x.stride(1) == 1 else x.contiguous() for x in rows]


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
