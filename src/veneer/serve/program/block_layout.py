"""Layout of a block: the changes of an adapter version at linear layers without values, and each tensor's offset.

Adapters that differ only in values have equal layouts. A layout is serialized as text, to be stored beside a block in
a file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast, get_type_hints

import torch
from torch import Tensor

from veneer.model.program.version import OwnChanges
from veneer.ops.cpu.step import LayerChange
from veneer.ops.linear.layer import NOTHING
from veneer.ops.packed import PackedWeight
from veneer.ops.pairs import Middle, PackedPairs
from veneer.ops.terms import LayerTerms, PackedTerm
from veneer.plain.field_types import fits
from veneer.plain.tensor_tree import bytes_of, mapped
from veneer.records.deltas import LinearDelta
from veneer.records.terms.scale import Scale
from veneer.serve.program.form import form_of, name_of, of_form

_ALIGNMENT = 64  # bytes, a line of a core's cache; the first one is left free, so that no tensor's offset is 0
_BESIDE = -1
_ODD = (ValueError, TypeError, LookupError, AttributeError, StopIteration, RuntimeError, ArithmeticError)
"""Errors of a text that is no layout: it may be any JSON, of any depth, with numbers of any size."""


@dataclass(frozen=True, slots=True)
class GroupChange:
    """Changes by one adapter version at layers that share their input.

    ``own`` has the low-rank pairs and all other changes; ``step`` has the other changes of each layer as the C++ step
    reads them. ``step`` is empty if there are only pairs, and None if the C++ step does not support one of the changes.
    """

    own: OwnChanges
    step: tuple[LayerChange, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """Layout of an adapter version's block of memory: its changes without values, and where each tensor lies.

    ``offsets`` are in bytes, for each group of layers in the order of `mapped`. Tensors without an offset are kept in
    ``changes``; a layout with such tensors belongs to one version. ``n_bytes``: size of a block. ``n_beside``: size of
    the tensors without an offset. ``text``: the serialized layout, empty if there are tensors without an offset.
    ``key`` is the text's SHA-256.
    """

    changes: tuple[GroupChange | None, ...]
    offsets: tuple[tuple[int, ...], ...]
    n_bytes: int
    n_beside: int = 0
    text: bytes = b""
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", hashlib.sha256(self.text).digest())

    @classmethod
    def parse(cls, text: bytes) -> BlockLayout:
        """Return the layout of a serialized text. Raises ValueError if the text is invalid."""
        try:
            layout = cls._parsed(text)
            memory = torch.empty(layout.n_bytes, dtype=torch.uint8, device="meta")
            for group in range(len(layout.changes)):
                layout.change(group, memory)
        except _ODD as error:
            raise ValueError(f"its layout describes no block: {error}") from error
        return layout

    @classmethod
    def _parsed(cls, text: bytes) -> BlockLayout:
        """Parse the text of a layout. Raises ValueError if a part has a type that no layout has."""
        form, offsets, n_bytes = json.loads(text)
        changes = [of_form(each, _KINDS) for each in form]
        layout = cls(cast(Any, tuple(changes)), tuple(map(tuple, offsets)), n_bytes, 0, text)
        hints = get_type_hints(cls)
        known = all(fits(getattr(layout, name), hints[name]) for name in ("changes", "offsets", "n_bytes"))
        if not known or len(changes) != len(offsets):
            raise ValueError("there are parts that no layout has")
        if [form_of(change) for change in changes] != form:
            raise ValueError("there are parts beyond those of a layout")
        if any(_BESIDE in each for each in layout.offsets):
            raise ValueError("there is a tensor beside the block")
        return layout

    def room(self) -> Tensor:
        """Return a zeroed block of memory, in system pages of its own, freed with the last reference."""
        if not self.n_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(-1, self.n_bytes), dtype=torch.uint8)

    def change(self, group: int, memory: Tensor) -> GroupChange | None:
        """Return the changes at a group, given the ``memory`` of a block; None if there are none."""
        offsets = iter(self.offsets[group])

        def placed(x: Tensor) -> Tensor:
            offset = next(offsets)
            return x if offset == _BESIDE else part(memory, offset, x)

        change = mapped(self.changes[group], placed)
        if next(offsets, None) is not None:
            raise ValueError("there are offsets of no tensor")
        return change


class Laying:
    """Assigner of offsets to a version's tensors, one after another. Tensors that share memory get one offset."""

    def __init__(self, changes: Sequence[GroupChange | None]) -> None:
        self.placed: list[tuple[Tensor, int]] = []
        self._n_bytes, self._seen = _ALIGNMENT, dict[tuple[object, ...], int]()
        self._offsets: list[list[int]] = []
        bare = tuple(self._bare(change) for change in changes)
        offsets, n_bytes = tuple(map(tuple, self._offsets)), self._n_bytes if self.placed else 0
        n_beside = bytes_of(bare)  # of tensors without an offset, and of what parts hold that are no tensors
        is_whole = not n_beside and not any(_BESIDE in each for each in offsets)
        text = json.dumps(([form_of(change) for change in bare], offsets, n_bytes)).encode() if is_whole else b""
        self.layout = BlockLayout(bare, offsets, n_bytes, n_beside, text)

    def offset_of(self, x: Tensor) -> int:
        """Return the offset that was assigned to a tensor. For a view of such a tensor, return the view's offset."""
        memory = x.new_empty(0).set_(x.untyped_storage())
        return self._seen[_place(memory)] + int(x.storage_offset()) * x.itemsize

    def _bare(self, change: GroupChange | None) -> GroupChange | None:
        self._offsets.append([])
        return mapped(change, self._put)

    def _put(self, x: Tensor) -> Tensor:
        if not (x.layout == torch.strided and x.is_cpu and x.is_contiguous()):
            self._offsets[-1].append(_BESIDE)
            return x
        place = _place(x)
        if place not in self._seen:
            self._seen[place] = self._n_bytes
            self.placed.append((x, self._n_bytes))
            self._n_bytes += x.nbytes + -x.nbytes % _ALIGNMENT
        self._offsets[-1].append(self._seen[place])
        return torch.empty_like(x, device="meta", requires_grad=False)


def part(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """Return the tensor at a byte offset of a block, with the dtype and shape of ``like``.

    Raises ValueError if the tensor would not lie within the block.
    """
    if offset % like.itemsize or not 0 < offset <= len(memory) - like.nbytes:
        raise ValueError(f"{like.nbytes} bytes at {offset} are not within a block of {len(memory)}")
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.dtype


def _maker(kind: Any) -> Callable[..., object]:
    """Return a function that creates objects of a class from field values. The function raises ValueError if a value
    has the wrong type.
    """
    hints = get_type_hints(kind)
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else list(kind._fields)

    def made(*values: Any) -> object:
        given = dict(zip(names, values, strict=True))
        wrong = [name for name, value in given.items() if not fits(value, hints[name])]
        if wrong:
            raise ValueError(f"there is a {kind.__name__} whose {wrong[0]} is of another type")
        return kind(**given)

    return made


def _record(*values: Any) -> LinearDelta:
    """Return a LinearDelta with these field values. If they change nothing, return the constant `NOTHING`."""
    record = cast(LinearDelta, _maker(LinearDelta)(*values))
    return NOTHING if record.changes_nothing else record


_KINDS: dict[str, Callable[..., object]] = {
    **{
        name_of(kind): _maker(kind)
        for kind in (
            GroupChange,
            OwnChanges,
            Scale,
            PackedPairs,
            LayerChange,
            PackedWeight,
            Middle,
            LayerTerms,
            PackedTerm,
        )
    },
    name_of(LinearDelta): _record,
}
