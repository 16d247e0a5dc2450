"""Attention to keys and values in pages, for serving (Kwon et al. 2023, arXiv 2309.06180): prompts, chunks, decoding.

The pages of all layers are in one `PagedStore`. A sequence has a page table; page j of the table holds its positions
from ``j * block`` on. `PagedRows` maps the rows of a step to sequences. Layer by layer, `append` writes their keys
and values into the pages, and `paged_attention` attends to them.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.attention import AttentionOptions, check_sinks
from veneer.ops.dispatch import implementation
from veneer.ops.memory import discard_pages, empty_pages

DTYPES = (torch.float32, torch.bfloat16)
PLAIN = AttentionOptions()
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of rows: (n, heads, head_dim) each."""
UNIT = 16  # tokens of a page, and values of a head, come in multiples of it


class Sized(Protocol):
    """Store of ``n_pages`` pages with ``block`` tokens each."""

    @property
    def n_pages(self) -> int: ...

    @property
    def block(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class PagedStore:
    """Pages of ``block`` tokens of keys and values of all layers, in ``data (n_pages, values of a page)``.

    csrc/paged_attention/paged_attention.h documents the layout. Queries are of the same dtype. ``memory`` is the
    mapping that holds ``data``, if the store owns it.
    """

    data: Tensor
    block: int
    n_layers: int
    kv_heads: int
    head_dim: int
    memory: mmap.mmap | None = None

    @classmethod
    def zeros(
        cls,
        n_pages: int,
        block: int,
        heads: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> PagedStore:
        """Return empty pages for ``heads = (n_layers, kv_heads, head_dim)``; memory is allocated when a page is first
        written.

        Raises ConfigError on invalid sizes or an unsupported dtype.
        """
        if min(n_pages, block, *heads) < 1 or block % UNIT or dtype not in DTYPES:
            raise ConfigError(
                f"{n_pages} pages of {block} tokens in {dtype} for {heads} layers, key heads and values of a head: all "
                f"must be positive, the tokens a multiple of {UNIT}, the dtype float32 or bfloat16"
            )
        n_layers, kv_heads, head_dim = heads
        values = n_layers * kv_heads * 2 * block * padded(head_dim)
        data, memory = empty_pages(n_pages, values, dtype, device)
        return cls(data, block, *heads, memory)

    @property
    def n_pages(self) -> int:
        """Number of pages."""
        return self.data.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: of ``block`` tokens at all layers."""
        return self.data.shape[1] * self.data.element_size()

    def discard(self, pages: Iterable[int]) -> None:
        """Give the memory of pages back to the system, if it supports this. The pages are then zeros or unchanged."""
        discard_pages(self.memory, self.page_bytes, pages)


def padded(head_dim: int) -> int:
    """Return the number of values of a head in a page: ``head_dim``, padded."""
    return -(-head_dim // UNIT) * UNIT


class PageTables:
    """Cache of page tables, converted to arrays. A tuple that the last step used is not converted again; lists always
    are.
    """

    def __init__(self) -> None:
        self._now: dict[int, tuple[Sequence[int], Sequence[int], int]] = {}
        self._before = self._now

    def begin(self) -> None:
        """Begin a step. From now on, arrays of the step before the last one are forgotten."""
        self._before, self._now = self._now, {}

    def of(self, pages: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return a page table as an array, and its highest page number. The table must not be empty."""
        known = self._before.get(id(pages)) or self._now.get(id(pages))
        if known is None or known[0] is not pages:
            known = (pages, array("q", pages), max(pages))
        if isinstance(pages, tuple):  # others may change
            self._now[id(pages)] = known
        return known[1], known[2]


@dataclass(frozen=True, slots=True, eq=False)
class PagedRows:
    """Rows of a step by sequence, as the kernels of all layers read them.

    ``pages`` holds the page tables of all sequences, one after the other. ``first_page`` and ``first_row`` hold where
    each sequence's pages and rows begin, and the ends of the last. ``position`` is that of each sequence's first row.
    """

    pages: Int[Tensor, " n_page_entries"]
    first_page: Int[Tensor, " n_sequences_plus_1"]
    first_row: Int[Tensor, " n_sequences_plus_1"]
    position: Int[Tensor, " n_sequences"]
    n_rows: int

    @classmethod
    def of(
        cls, sequences: Iterable[tuple[Sequence[int], int, int]], store: Sized, tables: PageTables | None = None
    ) -> PagedRows:
        """Return the rows of a step from its sequences: pages, position of the first row, number of rows.

        ``tables`` is a cache of page tables that is kept between steps. Raises ShapeError if a sequence has no row or
        too few pages, or writes a page that is not in the store.
        """
        block, n_pages = store.block, store.n_pages
        numbers, page_bounds, row_bounds, positions = array("q"), [0], [0], list[int]()
        tables = PageTables() if tables is None else tables
        tables.begin()
        for number, (pages, position, n_rows) in enumerate(sequences):
            stop = position + n_rows
            if position < 0 or n_rows < 1 or len(pages) * block < stop:
                raise ShapeError(
                    f"sequence {number}: {n_rows} rows from position {position} on need at least one row and pages up "
                    f"to their end; given {len(pages)} pages of {block}"
                )
            held, highest = tables.of(pages)
            if min(pages[position // block : -(-stop // block)]) < 0 or highest >= n_pages:
                raise ShapeError(f"sequence {number}: pages {list(pages)} are not all among the {n_pages} there are")
            numbers.extend(held)
            page_bounds.append(len(numbers))
            row_bounds.append(row_bounds[-1] + n_rows)
            positions.append(position)
        n, n_held = len(positions), len(numbers)
        numbers.extend(array("q", [*page_bounds, *row_bounds, *positions]))
        parts = torch.split(torch.frombuffer(numbers, dtype=torch.int64), [n_held, n + 1, n + 1, n])
        return cls(parts[0], parts[1], parts[2], parts[3], row_bounds[-1])

    def sequences(self) -> Iterator[tuple[list[int], int, int, int]]:
        """Iterate over the sequences: pages, position, first row, and the row after the last."""
        page_bounds, row_bounds = self.first_page.tolist(), self.first_row.tolist()
        pages = self.pages.tolist()
        for s, position in enumerate(self.position.tolist()):
            yield pages[page_bounds[s] : page_bounds[s + 1]], position, row_bounds[s], row_bounds[s + 1]


def append(
    store: PagedStore,
    layer: int,
    k: Float[Tensor, "n kv_heads head_dim"],
    v: Float[Tensor, "n kv_heads head_dim"],
    rows: PagedRows,
    *,
    backend: str | None = None,
) -> None:
    """Write the keys and values of a step's rows into their positions in one layer of the pages.

    A sequence's positions are written in order. Values behind its last written position may be overwritten. Raises
    ShapeError.
    """
    shape = (rows.n_rows, store.kv_heads, store.head_dim)
    _check(store, layer, {"k": (k, shape), "v": (v, shape)})
    implementation("paged_attention.append", k.device, backend)(store, layer, k, v, rows)


def append_turned(
    store: PagedStore,
    layer: int,
    heads: Heads,
    rows: PagedRows,
    tables: tuple[Float[Tensor, "1 n half"], Float[Tensor, "1 n half"]],
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> None:
    """Rotate the queries and keys of ``heads`` by each row's angles, then write keys and values as `append` does.

    ``heads`` are (n, q_heads, head_dim), (n, kv_heads, head_dim) and (n, kv_heads, head_dim). Queries are rotated in
    place; the memory of the keys may be overwritten. ``tables`` are cosines and sines, as
    `veneer.ops.rotary.rotate` takes them. A GPU computes all by one launch. Raises ShapeError.
    """
    (q, k, v), shape = heads, (rows.n_rows, store.kv_heads, store.head_dim)
    own = (rows.n_rows, q.shape[1] if q.ndim == 3 else 0, store.head_dim)
    _check(store, layer, {"q": (q, own), "k": (k, shape), "v": (v, shape)})
    sizes = [tuple(table.shape) for table in tables]
    half = sizes[0][-1] if sizes[0] else 0
    if sizes != [(1, rows.n_rows, half)] * 2 or 2 * half > store.head_dim or any(x.stride(-1) != 1 for x in tables):
        raise ShapeError(
            f"cos and sin must be (1, {rows.n_rows}, half), their last axes contiguous, with 2 * half at most "
            f"{store.head_dim}; given {sizes}"
        )
    implementation("paged_attention.append_turned", q.device, backend)(store, layer, heads, rows, tables, interleaved)


def paged_attention(
    store: PagedStore,
    layer: int,
    q: Float[Tensor, "n q_heads head_dim"],
    rows: PagedRows,
    options: AttentionOptions = PLAIN,
    bias: Float[Tensor, "q_heads n_positions"] | None = None,
    sinks: Float32[Tensor, " q_heads"] | None = None,
) -> Float[Tensor, "n q_heads head_dim"]:
    """Return softmax attention of each row's queries to its sequence up to the row itself, in one layer.

    Query head h reads key head ``h // (q_heads // kv_heads)``. Softmax and sums are float32; if the CPU multiplies
    bfloat16, probabilities are rounded to it. A row's result depends on its own sequence alone, bit for bit. The batch,
    the chunks of a prompt and the number of threads do not change it.

    ``bias`` (ALiBi) has a float32 value for each position, padded to a multiple of 16 positions. A score is changed by
    the value at its key's position minus that at its query's. ``bias`` replaces the options' slopes, and excludes their
    soft cap. ``sinks`` are a logit of each query head: one more term of the softmax's sum, without a value (gpt-oss,
    arXiv 2508.10925, section 2.2). Raises ShapeError.
    """
    _check(store, layer, {"q": (q, (rows.n_rows, q.shape[1] if q.ndim == 3 else 0, store.head_dim))})
    if q.shape[1] == 0 or q.shape[1] % store.kv_heads:
        raise ShapeError(
            f"{q.shape[1]} query heads do not fit {store.kv_heads} key heads: the number of query heads must be a "
            "multiple of that of key heads"
        )
    if bias is not None:
        _check_bias(bias, q, rows, options)
    if sinks is not None:
        check_sinks(sinks, q)
    scale = store.head_dim**-0.5 if options.scale is None else options.scale
    numbers = (scale, options.window or 0, options.softcap or 0.0)
    attend = implementation("paged_attention.attend", q.device, options.backend)
    out: Tensor = attend(store, layer, q, rows, *numbers, bias, sinks)
    return out


def _check_bias(bias: Tensor, q: Tensor, rows: PagedRows, options: AttentionOptions) -> None:
    n_positions = int((rows.position + rows.first_row.diff()).max()) if len(rows.position) else 0
    least = (q.shape[1], -(-n_positions // UNIT) * UNIT)
    fits = bias.ndim == 2 and bias.shape[0] == least[0] and bias.shape[1] >= least[1] and bias.shape[1] % UNIT == 0
    if not fits or bias.dtype != torch.float32 or not bias.is_contiguous() or options.softcap is not None:
        raise ShapeError(
            f"bias must be contiguous float32 of at least {least}, positions a multiple of {UNIT}, without a softcap; "
            f"given {tuple(bias.shape)} {bias.dtype}, softcap={options.softcap}"
        )


def _check(store: PagedStore, layer: int, given: dict[str, tuple[Tensor, tuple[int, int, int]]]) -> None:
    if not 0 <= layer < store.n_layers:
        raise ShapeError(
            f"layer {layer} is not among the {store.n_layers} of the pages: give 0 to {store.n_layers - 1}"
        )
    for name, (x, shape) in given.items():
        if tuple(x.shape) != shape or x.dtype != store.data.dtype or x.stride(2) != 1:
            raise ShapeError(
                f"{name} must be {shape} {store.data.dtype}, its last axis contiguous; given {tuple(x.shape)} "
                f"{x.dtype}, strides {x.stride()}"
            )
