"""Decoder's program by csrc/step: instructions on packed weights, run by one call.

Instructions read and write numbered registers; each pass gives their addresses. The program keeps the tensors that it
reads alive. One pass runs at a time.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.ops.cpu.delta import delta_sizes, delta_values
from veneer.ops.cpu.experts import router_numbers, stack_numbers
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.experts import PackedStack, Router
from veneer.ops.glu import UNITS
from veneer.ops.memory import address
from veneer.ops.packed import PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.pairs import PackedPairs
from veneer.ops.state.delta import DeltaWeights, StateShape, StateStore
from veneer.ops.state.windows import WindowStore
from veneer.ops.terms import TERM_KINDS, LayerTerms, PackedTerm

Part = Tensor | float | Sequence["Part"] | None
"""Part of an instruction."""
_ADD = 2  # role of a term that is added, behind those of the input and the output


@dataclass(frozen=True, slots=True)
class StepNorm:
    """Float32 weight (any offset added) and bias of a norm; ``subtracts_mean`` makes it a LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    subtracts_mean: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """Change of one linear layer by an adapter version, as the C++ step reads it.

    ``in_scale``, ``out_scale`` and ``bias`` are float32; ``own_bias`` is the bias in the rows' dtype. ``whole``
    replaces the weight. ``pair`` is a low-rank pair on the scaled input, and ``terms`` are further linear maps.
    """

    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None
    whole: PackedWeight | None = None
    pair: PackedPairs | None = None
    terms: LayerTerms | None = None


class ProductChange(NamedTuple):
    """Change by an adapter version of a product of several layers, which is the instruction with the number
    ``instruction``.

    ``pairs`` are the layers' low-rank pairs, or None. ``layers`` holds each layer's other changes; it is empty if there
    are none.
    """

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
    """Program of a decoder: instructions in order, and the changes that numbered adapter versions make to them.

    ``turns`` are cosines and sines (n_positions, half) of each rotation, in float32. Registers hold tensors of rows;
    each tensor has a number. The program is freed when the interpreter exits, even if a thread that is still running
    refers to it.
    """

    def __init__(self, dtype: torch.dtype, turns: Mapping[Any, tuple[Tensor, Tensor]] = MappingProxyType({})) -> None:
        self.dtype, self.n_instructions, self.n_tensors = dtype, 0, 0
        self._rotations = tuple(turns)
        numbers = [number for cos, sin in turns.values() for number in (address(cos), address(sin), *cos.shape[::-1])]
        self._held: list[Any] = [kernels().StepProgram(DTYPES[dtype], numbers)]
        weakref.finalize(self, self._held.clear)
        self._kept: list[Any] = [list(turns.values())]
        self._first: dict[tuple[str, tuple[int, ...]], int] = {}
        self._of_versions: defaultdict[int, list[Any]] = defaultdict(list)

    @property
    def _program(self) -> Any:
        return self._held[0]

    def first_of(self, register: tuple[str, tuple[int, ...]]) -> int:
        """Return the number of the first tensor of a register. Tensors get numbers when their register is first asked
        for.

        ``register`` is its name and the widths of its tensors.
        """
        if register not in self._first:
            self._first[register] = self.n_tensors
            self.n_tensors += len(register[1])
        return self._first[register]

    def table_of(self, rotation: object) -> int:
        """Return the number of a rotation's tables; -1 for None."""
        return -1 if rotation is None else self._rotations.index(rotation)

    def add(self, kind: str, *parts: Part) -> None:
        """Add an instruction by the function ``add_<kind>`` of csrc/step, which documents its ``parts``.

        Tensors among them are kept alive, and passed as addresses. None is passed as 0.
        """
        getattr(self._program, f"add_{kind}")(*map(self._sent, parts))
        self.n_instructions += 1

    def add_experts(
        self,
        router: Router,
        bias: Tensor | None,
        stacks: tuple[PackedStack, PackedStack],
        activation: str,
        at: list[int],
    ) -> None:
        """Add the experts of a mixture. ``bias`` is added to the values by which experts are chosen.

        ``at``: the numbers of five tensors: scores, source, output of the shared expert, gate of the shared expert, and
        target. The third or fourth is -1 if there is no shared expert, or no gate of it.
        """
        panels = [stack_numbers(stack, address(stack.panels)) for stack in stacks]
        self._kept.append(stacks)
        self.add("experts", router_numbers(router), router.scale, bias, *panels, UNITS[activation], at)

    def add_delta(
        self, shape: StateShape, weights: DeltaWeights, layer: int, parts: list[list[int]], target: int
    ) -> None:
        """Add the gated delta rule of a layer of the states in pages.

        ``parts``: for queries, keys, values, gates z, b and a each the number of a tensor, the first head's first
        value, and the values from one key head to the next.
        """
        held = list(delta_values(weights, self.dtype))
        self.add("delta", delta_sizes(shape), weights.eps, weights.beta_scale, held, layer, parts, target)

    def _sent(self, part: Part) -> Any:
        if isinstance(part, Tensor):
            self._kept.append(part)
            return address(part)
        if isinstance(part, list | tuple):
            return type(part)(map(self._sent, part))
        return 0 if part is None else part

    def add_layout(self, layout: int, changes: Sequence[ProductChange], block: Tensor) -> None:
        """Add a layout under the number ``layout``: the offsets at which the tensors of an adapter version lie in its
        block of memory.

        Adapter versions with equal offsets share a layout. The tensors of ``changes`` must be views of ``block``; the
        offsets are read from them.
        """
        numbers = [
            (each.instruction, _pairs(each.pairs), [_change(layer) for layer in each.layers]) for each in changes
        ]
        self._program.add_layout(layout, address(block), numbers)

    def drop_layout(self, layout: int) -> None:
        """Drop a layout that no adapter version uses any more."""
        self._program.drop_layout(layout)

    def take(self, version: int, layout: int, block: Tensor) -> None:
        """Add an adapter version whose tensors lie in ``block``, at the offsets of the numbered ``layout``.

        The block is kept alive.
        """
        self._program.take(version, layout, address(block))
        self._of_versions[version].append(block)

    def take_bottleneck(self, version: int, instruction: int, pairs: PackedPairs, *, reads_output: bool) -> None:
        """Add an adapter version's bottleneck to an instruction: a ``change``, or a product whose output is added to
        the residual stream.

        The bottleneck reads the output of the attention or feed-forward layer if ``reads_output``, else the input of
        this layer.
        """
        self._program.take_bottleneck(instruction, version, _pairs(pairs), reads_output)
        self._of_versions[version].append(pairs)

    def take_norm(self, version: int, instruction: int, norm: StepNorm) -> None:
        """Make an adapter version use its own norm in a norm or head instruction."""
        self._program.take_norm(instruction, version, norm_parts(norm))

    def seconds(self) -> list[float]:
        """Return the seconds that each instruction has taken since the last call."""
        return list(self._program.seconds())

    def drop(self, version: int) -> None:
        """Drop an adapter version, and release its blocks."""
        self._program.drop(version)
        self._of_versions.pop(version, None)

    def run(
        self,
        part: range,
        registers: list[int],
        pages: tuple[PagedStore, WindowStore | None, StateStore | None, PagedRows] | None,
        rows: StepRows,
        runs: Sequence[tuple[int, int, int]],
    ) -> None:
        """Run the instructions whose numbers are in ``part``.

        ``registers`` are the `places` of tensors (n, width). ``runs`` are (adapter version, first row, row after
        the last). Raises IndexError for an id outside a table of embeddings, or a position outside the rotation
        tables.
        """
        store, batch = _pages(*pages) if pages else ([0] * 9, [0] * 5)
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
    """Return a flat list: the address and the row stride of the first register, of the second, and so on."""
    return [number for register in registers for number in (address(register), register.stride(0))]


def _pages(
    store: PagedStore, windows: WindowStore | None, states: StateStore | None, rows: PagedRows
) -> tuple[list[int], list[int]]:
    tables = (rows.pages, rows.first_page, rows.first_row, rows.position)
    sizes = [address(store.data), store.block, store.n_layers, store.kv_heads, store.head_dim]
    sizes += [n for held in (windows, states) for n in ([0, 0] if held is None else _layers_of(held.data))]
    return sizes, [len(rows.position), *map(address, tables)]


def _layers_of(pages: Tensor) -> list[int]:
    return [address(pages), pages.shape[1]]


def _at(x: Tensor | None) -> int:
    return 0 if x is None else address(x)


def _coding(weight: PackedWeight | PackedCodes) -> tuple[int, int]:
    return (weight.coding_number, weight.unit) if isinstance(weight, PackedCodes) else (0, 0)


def layer_parts(
    weight: PackedWeight | PackedCodes, bias: Tensor | None, target: int, wide_bias: Tensor | None = None
) -> list[Part]:
    """Return the arguments that describe a layer in an instruction: its weight, its bias in the rows' dtype, and its
    output tensor.

    ``wide_bias`` is the bias in float32, which the step copies.
    """
    return [*weight.shape, weight.depth, weight.panels, bias, _at(wide_bias), target, *_coding(weight)]


def norm_parts(norm: StepNorm | None) -> tuple[bool, float, int, int, int]:
    """Return the numbers that describe a norm to the step, which copies the norm's values; zeros for None.

    They are: is a LayerNorm, eps, width, address of the weight, address of the bias.
    """
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
    """Return the number of terms, then each term's numbers: role, kind, four sizes, addresses. For None, return the
    number 0 alone.
    """
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
