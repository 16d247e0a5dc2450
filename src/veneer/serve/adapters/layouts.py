"""Layouts of adapter files: if two files differ only in values, the second is read and packed by a table.

Reading an adapter of a new layout examines every tensor: the layer that it is for, its shape, its packing. All of this
follows from the config and the file's header. If a file holds only low-rank factors, as LoRA's does, the next one with
the same config and header takes a few calls for each megabyte.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.disk.safetensors_header import MAX_HEADER_BYTES, PREFIX_BYTES
from veneer.model.program.version import OwnChanges
from veneer.ops.pairs import Factor, pack_factors
from veneer.plain.lru import LruCache
from veneer.serve.program.block import VersionBlock
from veneer.serve.program.block_layout import BlockLayout
from veneer.store.checkpoint import is_finite

_KEPT = 512  # layouts
_AT_ONCE = 1 << 20  # bytes of a file: they are looked at and packed while they lie in a core's cache

Head = tuple[str, bytes]
"""Config of an adapter as text, and the bytes of its file before the values."""
_UNREAD = ("base_model_name_or_path", "revision", "lora_dropout", "peft_version")  # settings that change no layout


class Layouts:
    """Layouts of the most recently read adapters. Any thread may use it."""

    def __init__(self) -> None:
        self._known: LruCache[Head, _Layout] = LruCache(_KEPT)
        self._memory: dict[torch.dtype, Tensor] = {}  # values are read into it, those of all layouts
        self._lock = threading.Lock()  # of that memory

    def read(self, folder: Path) -> VersionBlock | None:
        """Return an adapter's packed block. Return None if its layout is new, or if its files have a fault.

        The caller then reads the files in full, which reports a fault.
        """
        if self._known:
            with suppress(OSError, ValueError), _opened(folder) as (head, file), self._lock:
                layout = self._known.get(head)
                return None if layout is None else layout.read(file)
        return None

    def learn(self, folder: Path, block: VersionBlock, factors: Sequence[Factor]) -> None:
        """Store the layout of an adapter's file, if reading the file by this layout gives the values of ``block``
        again.

        ``factors`` are the low-rank factors from which the block was packed.
        """
        with self._lock:
            layout = _layout_of(block, factors, self._memory)
        if layout is None:
            return
        with suppress(OSError, ValueError), _opened(folder) as (head, file), self._lock:
            again = layout.read(file)
            if again is None or not torch.equal(block.memory, again.memory):
                return  # its files were replaced meanwhile
            self._known.put(head, layout)


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Head, FileIO]]:
    """Open an adapter's file. Yield its `Head` (config and header), and the file, positioned at the first value.

    Raises ValueError if the config is not a JSON object.
    """
    config = _config_of(json.loads((folder / CONFIG_FILE).read_bytes()))
    with (folder / WEIGHTS_FILE).open("rb", buffering=0) as file:
        prefix = file.read(PREFIX_BYTES)
        n = int.from_bytes(prefix, "little")
        yield (config, prefix + (file.read(n) if n <= MAX_HEADER_BYTES else b"")), file


def _config_of(read: Any) -> str:
    """Return, as JSON text, the fields of a config on which the layout of its file depends.

    Lists are sorted, because PEFT writes sets in any order. Mappings keep their order, because the first pattern that
    matches a module is used. Raises ValueError if ``read`` is not a dict.
    """
    if not isinstance(read, dict):
        raise ValueError("no mapping")
    fields = sorted((name, value) for name, value in read.items() if name not in _UNREAD)
    return json.dumps({name: sorted(map(str, v)) if isinstance(v, list) else v for name, v in fields})


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive tensors of a file: memory into which their values are read, and the low-rank factors in that memory.

    Each factor has the slice of the packed block into which it is packed.
    """

    values: Tensor
    factors: list[tuple[Factor, slice]]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Layout of an adapter's file: its consecutive tensors, all of one dtype, and the block into which they are
    packed."""

    stretches: list[_Stretch]
    block: BlockLayout
    dtype: torch.dtype

    def read(self, file: FileIO) -> VersionBlock | None:
        """Read the file's values and pack them. Return None if the file has too few or too many, or if one is not
        finite.
        """
        block = VersionBlock(self.block, self.block.room())
        room = block.memory.view(self.dtype)
        for stretch in self.stretches:
            n_read = file.readinto(stretch.values.view(torch.uint8).numpy().data)
            if n_read != stretch.values.nbytes or not is_finite(stretch.values):
                return None
            pack_factors([factor._replace(panels=room[place]) for factor, place in stretch.factors])
        return None if file.read(1) else block


def _layout_of(block: VersionBlock, factors: Sequence[Factor], memory: dict[torch.dtype, Tensor]) -> _Layout | None:
    """Return the layout of a file with these factors. Return None if the file holds other values too, if the factors
    have several dtypes, or if a change is more than low-rank pairs.

    Values are read into ``memory``, which grows if it is too small.
    """
    ordered = sorted(factors, key=lambda factor: factor.rows.storage_offset())
    changes = [change.own for change in block.layout.changes if change is not None]
    one_dtype = len({factor.panels.dtype for factor in factors}) == 1
    if not one_dtype or not _fill_one_memory([factor.rows for factor in ordered]) or not all(map(is_plain, changes)):
        return None
    parts = list(_parts(ordered))
    rows, longest = ordered[0].rows, max(sum(factor.rows.numel() for factor in part) for part in parts)
    if rows.dtype not in memory or len(memory[rows.dtype]) < longest:
        memory[rows.dtype] = rows.new_empty(max(longest, _AT_ONCE // rows.itemsize))
    stretches = [_stretch(part, memory[rows.dtype], block.memory.data_ptr()) for part in parts]
    return _Layout(stretches, block.layout, ordered[0].panels.dtype)


def is_plain(own: OwnChanges) -> bool:
    """Return True if changes are low-rank pairs and nothing else."""
    return own.only_adds and own.pairs is not None and own.pairs.middle is None


def _fill_one_memory(tensors: Sequence[Tensor]) -> bool:
    """Return True if tensors of one dtype fill a piece of memory, one after another and without gaps."""
    if not tensors:
        return False
    first, memory = tensors[0], tensors[0].untyped_storage()
    ends = accumulate((x.numel() for x in tensors), initial=0)
    return sum(x.nbytes for x in tensors) == memory.nbytes() and all(
        x.dtype == first.dtype and x.is_contiguous() and x.storage_offset() == end
        and x.untyped_storage().data_ptr() == memory.data_ptr()
        for x, end in zip(tensors, ends, strict=False)
    )  # fmt: skip


def _parts(ordered: Sequence[Factor]) -> Iterator[list[Factor]]:
    """Divide factors into groups of consecutive ones. Each group is read at once, and has at most `_AT_ONCE` bytes
    unless it is a single factor.
    """
    part, n_bytes = list[Factor](), 0
    for factor in ordered:
        if part and n_bytes + factor.rows.nbytes > _AT_ONCE:
            yield part
            part, n_bytes = [], 0
        part.append(factor)
        n_bytes += factor.rows.nbytes
    yield part


def _stretch(factors: Sequence[Factor], memory: Tensor, block: int) -> _Stretch:
    """Return the `_Stretch` of consecutive factors: they are read into ``memory``, and packed into the block at the
    address ``block``.
    """
    found, at = list[tuple[Factor, slice]](), 0
    for factor in factors:
        n, panels = factor.rows.numel(), factor.panels
        rows = memory[at : at + n].view(factor.rows.shape)
        start = (panels.data_ptr() - block) // panels.itemsize
        found.append((factor._replace(rows=rows, panels=rows), slice(start, start + panels.numel())))
        at += n
    return _Stretch(memory[:at], found)
