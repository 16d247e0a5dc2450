"""Keys and values of a program's layers in pages: appended to and attended to by the rows of a step.

Two caches share one interface: pages of the kernels, and slots in plain torch if the kernels do not support a program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from veneer.model.batch.own_cache import KeptBytes
from veneer.model.batch.paged import KeysValues, PagedStep, SeenKeys, SlotStore, Stretch, attend
from veneer.model.blueprint.parts import Attention
from veneer.model.program.program import Program
from veneer.model.program.rows import PagedCache
from veneer.ops import paged_attention as kernel
from veneer.ops.attention import AttentionOptions
from veneer.ops.dispatch import backends
from veneer.ops.rotary import rotate_both
from veneer.ops.state.conv import ConvKernel, GatedInput
from veneer.ops.state.delta import DeltaInput, DeltaWeights, StateStore, delta_in_pages
from veneer.ops.state.windows import WindowStore, windowed_conv


class KVCache(PagedCache, Protocol):
    """Pages of the keys and values of all layers."""

    def rows(self, stretches: Sequence[Stretch]) -> Any:
        """Return the positions of new tokens in pages, and the keys that they attend to, for all layers of a step.

        The index tensors are in host memory.
        """

    def slots(self) -> SlotStore:
        """Return the same pages in the layout that transformers' own attention reads.

        A page is used in only one of the two layouts at a time.
        """

    def discard(self, pages: Sequence[int]) -> None:
        """Free the memory of unused pages, if possible."""


def make_cache(program: Program, n_pages: int, block: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Return empty pages for a program, which take memory when they are written to."""
    heads, windows, states = _heads_in_pages(program, block, dtype, device), None, None
    if program.page_states:
        states = StateStore.zeros(n_pages, len(program.page_states), block, program.page_states[0].shape, device=device)
    if program.windows:
        sizes = (n_pages, len(program.windows), block, program.windows[0].width)
        windows = WindowStore.zeros(*sizes, dtype=dtype, device=device)
    if heads is None:
        return SlotCache(SlotStore(n_pages, block), windows, states)
    shape = (len(program.states), *heads)
    return PageCache(kernel.PagedStore.zeros(n_pages, block, shape, dtype=dtype, device=device), windows, states)


def page_size(program: Program | None, given: int | None) -> int:
    """Return the tokens of a page: the ``given`` number, or by default 16, and 256 if scans keep a state for each page.

    Such a state is as large as the keys of hundreds of tokens.
    """
    return given or (_STATE_PAGE if program is not None and program.page_states else _PAGE)


def kept_in_pages(program: Program, block: int, dtype: torch.dtype, device: torch.device) -> KeptBytes:
    """Return the bytes that a position and a page take in the pages of `make_cache`."""
    states = sum(state.n_bytes for state in program.page_states)
    return KeptBytes(numbers_per_position(program, block, dtype, device) * dtype.itemsize, page=states)


_PAGE, _STATE_PAGE = 16, 256


def numbers_per_position(program: Program, block: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of values that one position takes in the pages of `make_cache`, with the padding of heads."""
    heads = _heads_in_pages(program, block, dtype, device)
    if heads is None:
        return program.numbers_per_position
    of_windows = sum(window.n_numbers for window in program.windows)
    return 2 * len(program.states) * heads[0] * kernel.padded(heads[1]) + of_windows


def _heads_in_pages(program: Program, block: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int] | None:
    """Return the number of key heads in a layer and the number of values in a head.

    Return None if the paged kernels do not support the block size, dtype or device, or if layers differ in heads.
    """
    heads = set(program.states)
    computed = device.type == "cpu" or "triton" in backends("paged_attention.attend")
    fits = len(heads) == 1 and block % kernel.UNIT == 0 and dtype in kernel.DTYPES and computed
    return heads.pop() if fits else None


@dataclass(frozen=True, slots=True)
class PageCache:
    """Cache in the kernels' pages, ``windows`` of short convolutions, and ``states`` of scans.

    ``tables`` keeps the page tables of the last step for reuse.
    """

    store: kernel.PagedStore
    windows: WindowStore | None = None
    states: StateStore | None = None
    tables: kernel.PageTables = field(default_factory=kernel.PageTables)

    def rows(self, stretches: Sequence[Stretch]) -> kernel.PagedRows:
        return kernel.PagedRows.of(stretches, self.store, self.tables)

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: kernel.PagedRows) -> None:
        kernel.append(self.store, layer, keys, values, rows)

    def append_turned(
        self, layer: int, heads: kernel.Heads, rows: Any, tables: tuple[Tensor, Tensor], *, interleaved: bool
    ) -> None:
        kernel.append_turned(self.store, layer, heads, rows, tables, interleaved=interleaved)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        rows: kernel.PagedRows,
        part: Attention,
        extra: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        options = AttentionOptions(scale=part.scale, window=part.window, softcap=part.softcap)
        return kernel.paged_attention(self.store, layer, queries, rows, options, *extra).flatten(1)

    def convolve(self, layer: int, given: GatedInput, weights: ConvKernel, rows: kernel.PagedRows) -> Tensor:
        return windowed_conv(cast(WindowStore, self.windows), layer, given, weights, rows)

    def scan(self, layer: int, given: DeltaInput, weights: DeltaWeights, rows: kernel.PagedRows) -> Tensor:
        return delta_in_pages(cast(StateStore, self.states), layer, given, weights, rows)

    def slots(self) -> SlotStore:
        return SlotsInPages(self.store)

    def discard(self, pages: Sequence[int]) -> None:
        for store in (self.store, self.windows, self.states):
            if store is not None:
                store.discard(pages)


class SlotsInPages(SlotStore):
    """Slots in the kernels' pages: for each layer all keys of a page, then all values."""

    def __init__(self, store: kernel.PagedStore) -> None:
        super().__init__(store.n_pages, store.block)
        shape = (2 * store.n_layers, store.block, store.kv_heads, store.head_dim)
        parts = store.data[:, : math.prod(shape)].view(store.n_pages, *shape).unbind(1)
        self.layers = {layer: (parts[2 * layer], parts[2 * layer + 1]) for layer in range(store.n_layers)}

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[slots // self.block, slots % self.block] = new.to(kept.dtype)

    def read(self, layer: int, slots: Tensor) -> KeysValues:
        keys, values = self.layers[layer]
        places = (slots // self.block, slots % self.block)
        return keys[places], values[places]


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows of a pass by slots. ``seen``: the keys that they attend to, by window, computed on first use.

    ``paged`` are the same rows by pages, for short convolutions and scans; None if the program has neither.
    """

    step: PagedStep
    paged: kernel.PagedRows | None = None
    seen: dict[int | None, SeenKeys] = field(default_factory=dict)

    def within(self, window: int | None) -> SeenKeys:
        """Return the keys that each token attends to: the last ``window`` keys up to its own position, or all of these
        if ``window`` is None.
        """
        if window not in self.seen:
            self.seen[window] = SeenKeys(lambda _batch, _head, query, key: _near(query, key, window))
        return self.seen[window]


@dataclass(frozen=True, slots=True)
class SlotCache:
    """Cache in plain torch, for any page size, dtype, device and mixture of heads."""

    store: SlotStore
    windows: WindowStore | None = None
    states: StateStore | None = None

    def rows(self, stretches: Sequence[Stretch]) -> SlotRows:
        paged = None if self.windows is None and self.states is None else kernel.PagedRows.of(stretches, self.store)
        return SlotRows(PagedStep.of(self.store, stretches, torch.device("cpu")), paged)

    def convolve(self, layer: int, given: GatedInput, weights: ConvKernel, rows: SlotRows) -> Tensor:
        return windowed_conv(cast(WindowStore, self.windows), layer, given, weights, cast(Any, rows.paged))

    def scan(self, layer: int, given: DeltaInput, weights: DeltaWeights, rows: SlotRows) -> Tensor:
        return delta_in_pages(cast(StateStore, self.states), layer, given, weights, cast(Any, rows.paged))

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: SlotRows) -> None:
        self.store.write(layer, rows.step.slots, keys, values)

    def append_turned(
        self, layer: int, heads: kernel.Heads, rows: Any, tables: tuple[Tensor, Tensor], *, interleaved: bool
    ) -> None:
        q, k, v = heads
        cos, sin = tables
        rotate_both(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin, interleaved=interleaved)
        self.append(layer, k, v, rows)

    def attend(
        self, layer: int, queries: Tensor, rows: SlotRows, part: Attention, extra: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        (bias, sinks), seen = extra, rows.within(part.window)
        out = torch.empty_like(queries)
        for number, group in enumerate(rows.step.groups):
            keys, values = (x.transpose(1, 2) for x in self.store.read(layer, group.slots))
            own = queries[group.rows].transpose(1, 2) * part.scale
            mask = seen.of(number, group)[:, None]
            if bias is not None:
                mask = _biases(bias, group.positions, mask.shape[-1]).masked_fill(~mask, -math.inf)
            mixed = attend(own, keys, values, mask, part.softcap, sinks)
            out[group.rows] = mixed.transpose(1, 2)
        return out.flatten(1)

    def slots(self) -> SlotStore:
        return self.store

    def discard(self, pages: Sequence[int]) -> None:
        """Free these pages of short convolutions and scans. Those of keys and values are plain tensors, which cannot be
        freed by pages.
        """
        for store in (self.windows, self.states):
            if store is not None:
                store.discard(pages)


def _biases(bias: Tensor, queries: Tensor, n_keys: int) -> Tensor:
    """Return the biases (g, heads, c, n_keys) to add to attention scores, for ``queries`` (g, c), the queries'
    positions.
    """
    keys = torch.arange(n_keys, device=bias.device).clamp(max=bias.shape[1] - 1)
    return bias[:, keys][:, None] - bias[:, queries].transpose(0, 1)[..., None]


def _near(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    return key <= query if window is None else key > query - window
