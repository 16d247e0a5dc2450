"""Keys and values of a program's layers in pages: appended to and attended to by the rows of a step.

Two of one interface: pages of the kernels, and slots in plain torch for what those do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from veneer.model.blueprint.parts import Attention
from veneer.model.paged import PagedStore, Stretch, attend
from veneer.ops import paged_attention as kernel
from veneer.ops.attention import AttentionOptions
from veneer.serve.program import Program


class KVCache(Protocol):
    """The pages of all layers."""

    def rows(self, stretches: Sequence[Stretch]) -> Any:
        """The places of the new tokens of sequences and the keys that they see, for all layers of a step."""

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: Any) -> None:
        """Put the keys and values (n, kv_heads, width) of a step's rows into their places."""

    def attend(self, layer: int, queries: Tensor, rows: Any, part: Attention) -> Tensor:
        """Attention of queries (n, heads, width) to their sequences, (n, heads · width); their own keys are there."""


def make_cache(program: Program, n_pages: int, block: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Empty pages for a program, which take memory when they are written to."""
    heads = {(part.heads.n_kv_heads, part.heads.head_dim) for part in program.attentions}
    fits = len(heads) == 1 and block % kernel.UNIT == 0 and dtype in kernel.DTYPES and device.type == "cpu"
    if not fits:
        return SlotCache(PagedStore(n_pages, block), device)
    [(n_heads, width)] = heads
    layers = len(program.attentions)
    return PageCache(kernel.PagedStore.zeros(n_pages, block, (layers, n_heads, width), dtype=dtype))


@dataclass(frozen=True, slots=True)
class PageCache:
    """The kernels' pages."""

    store: kernel.PagedStore

    def rows(self, stretches: Sequence[Stretch]) -> kernel.PagedRows:
        return kernel.PagedRows.of([kernel.SequenceRows(s.pages, s.start, s.n) for s in stretches], self.store)

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: kernel.PagedRows) -> None:
        kernel.append(self.store, layer, keys, values, rows)

    def attend(self, layer: int, queries: Tensor, rows: kernel.PagedRows, part: Attention) -> Tensor:
        options = AttentionOptions(scale=part.scale, window=part.window, softcap=part.softcap)
        return kernel.paged_attention(self.store, layer, queries, rows, options).flatten(1)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with equally many new tokens, g of them with c each, over L slots at most.

    ``rows`` (g, c) of the pass, ``slots`` (g, L) of what they may see, and the new tokens' ``places`` (g, c) in it.
    """

    rows: Tensor
    places: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class SlotRows:
    """``slots`` (n,) of the new tokens; ``masks`` of the groups by window, made when they are first asked for."""

    slots: Tensor
    groups: list[_Group]
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, number: int, window: int | None) -> Tensor:
        """The keys that the queries of a group see, (g, 1, c, L): those up to themselves within the window."""
        if (number, window) not in self.masks:
            group = self.groups[number]
            ahead = torch.arange(group.slots.shape[1], device=group.slots.device) - group.places[:, :, None]
            seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
            self.masks[number, window] = seen[:, None]
        return self.masks[number, window]


@dataclass(frozen=True, slots=True)
class SlotCache:
    """Plain torch: any size of page, any dtype, any device, any mixture of heads."""

    store: PagedStore
    device: torch.device

    def rows(self, stretches: Sequence[Stretch]) -> SlotRows:
        every = [_slots(stretch, self.store.block) for stretch in stretches]
        slots = np.concatenate([at[s.start :] for s, at in zip(stretches, every, strict=True)])
        return SlotRows(torch.from_numpy(slots).to(self.device), _groups(stretches, every, self.device))

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: SlotRows) -> None:
        self.store.write(layer, rows.slots, keys, values)

    def attend(self, layer: int, queries: Tensor, rows: SlotRows, part: Attention) -> Tensor:
        out = torch.empty_like(queries)
        for number, group in enumerate(rows.groups):
            keys, values = (x.transpose(1, 2) for x in self.store.read(layer, group.slots))
            own = queries[group.rows].transpose(1, 2) * part.scale
            mixed = attend(own, keys, values, rows.mask(number, part.window), part.softcap, None)
            out[group.rows] = mixed.transpose(1, 2)
        return out.flatten(1)


def _slots(stretch: Stretch, block: int) -> Any:
    """The slots of all positions of a sequence."""
    pages = np.array(stretch.pages, dtype=np.int64)
    return (pages[:, None] * block + np.arange(block)).reshape(-1)[: stretch.start + stretch.n]


def _groups(stretches: Sequence[Stretch], every: Sequence[Any], device: torch.device) -> list[_Group]:
    found, bounds = [], np.concatenate([[0], np.cumsum([s.n for s in stretches])])
    for n in dict.fromkeys(s.n for s in stretches):
        members = [i for i, s in enumerate(stretches) if s.n == n]
        slots = np.zeros((len(members), max(len(every[i]) for i in members)), dtype=np.int64)
        for row, i in zip(slots, members, strict=True):
            row[: len(every[i])] = every[i]
            row[len(every[i]) :] = every[i][-1]  # what is hidden must be finite all the same
        rows = bounds[members][:, None] + np.arange(n)
        places = np.array([stretches[i].start for i in members])[:, None] + np.arange(n)
        found.append(_Group(*(torch.from_numpy(x).to(device) for x in (rows, places, slots))))
    return found
