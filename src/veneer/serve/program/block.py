"""Block of memory with all changes of an adapter version at linear layers; equal versions share one layout.

The C++ step receives a block's address and layout. Objects of single groups of layers are made only when torch needs
them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from veneer.model.program.bottleneck import Bottleneck
from veneer.model.program.version import Effects, OwnChanges
from veneer.ops.pairs import Factor
from veneer.plain.lru import LruCache
from veneer.serve.program.block_layout import BlockLayout, GroupChange, Laying, part


@dataclass(slots=True, eq=False)
class VersionBlock:
    """Changes of one adapter version at all groups of layers."""

    layout: BlockLayout
    memory: Tensor
    _made: dict[int, OwnChanges] = field(default_factory=dict, init=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes of the block, in whole system pages, and of the tensors that are kept outside it."""
        return self.memory.nbytes + -self.memory.nbytes % mmap.PAGESIZE + self.layout.n_beside

    def __iter__(self) -> Iterator[OwnChanges | None]:
        """Yield the changes at each group."""
        return (self.own(group) for group in range(len(self.layout.changes)))

    def own(self, group: int) -> OwnChanges | None:
        """Return the changes at a group; None if there are none."""
        made = self._made.get(group)
        if made is None and (change := self.change(group)) is not None:
            made = self._made[group] = change.own
        return made

    def change(self, group: int) -> GroupChange | None:
        """Return the changes at a group, with their form for the C++ step; None if there are none."""
        return None if self.layout.changes[group] is None else self.layout.change(group, self.memory)


@dataclass(frozen=True, slots=True)
class PackedEffects:
    """Effects of an adapter version, packed: the block of the linear layers, and each bottleneck."""

    effects: Effects
    linears: VersionBlock
    bottlenecks: dict[str, Bottleneck]

    @property
    def is_block(self) -> bool:
        """Return True if the version has no effects outside its block."""
        return not self.bottlenecks and self.effects == Effects()


class Blocks:
    """Maker of blocks. A cache of recent layouts makes equal layouts one object. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._layouts: LruCache[bytes, BlockLayout] = LruCache(most)

    def layout(self, key: bytes) -> BlockLayout | None:
        """Return the cached layout with this key; None if there is none."""
        return self._layouts.get(key)

    def shared(self, layout: BlockLayout) -> BlockLayout:
        """Return the equal layout in the cache if there is one, otherwise add this one."""
        if not layout.text:
            return layout
        known = self._layouts.get(layout.key) or layout
        self._layouts.put(layout.key, known)
        return known

    def block(
        self, changes: Sequence[GroupChange | None], factors: Sequence[Factor]
    ) -> tuple[VersionBlock, list[Factor]]:
        """Return the block of an adapter version, and the factors packed into it, each with its part of the block.

        Factors that are not on the CPU are not packed: they are kept beside the block.
        """
        laying = Laying(changes)
        layout = self.shared(laying.layout)
        block = VersionBlock(layout, layout.room())
        for x, offset in laying.placed:
            part(block.memory, offset, x).copy_(x.detach())
        placed = [f for f in factors if f.panels.is_cpu]
        return block, [f._replace(panels=part(block.memory, laying.offset_of(f.panels), f.panels)) for f in placed]
