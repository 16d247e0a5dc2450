"""Interpreter of a program: its operations on a model's weights, in C++ if the native step supports them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.program.binding import Binding
from veneer.model.program.bottleneck import Bottleneck
from veneer.model.program.expert_stacks import ExpertStacks, Stacks
from veneer.model.program.linears import Linears, Packed, VersionPacking
from veneer.model.program.logits import LogitRows
from veneer.model.program.operation import Bound, Frame
from veneer.model.program.product import changes_of
from veneer.model.program.program import Program
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Effects, OwnChanges
from veneer.ops.cpu.step import LayerChange
from veneer.ops.dispatch import kernel_isa
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.packed import ROWS
from veneer.ops.pairs import Factor, Segments
from veneer.ops.terms import LayerTerms
from veneer.serve.program.block import Blocks, PackedEffects, VersionBlock
from veneer.serve.program.block_layout import GroupChange
from veneer.serve.program.native import Call, NativeStep

MOST_PLANS = 64
_KEPT = 512  # layouts of blocks


class Interpreter:
    """Runs a decoder's program on a model's weights, and on adapters that `take` adds, each under the name of its
    version.

    Weights in ``packed``, and experts in ``stacks``, take the place of the model's. ``native`` runs the same program in
    C++, with the same bits; it is None if there are no kernels for the dtype or the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        packed: Packed,
        stacks: Mapping[tuple[str, ...], Stacks] = MappingProxyType({}),
    ) -> None:
        self.program, self.dtype, self.device = program, model.dtype, model.device
        self.versions: dict[str, PackedEffects] = {}
        self._packed, self._linears = packed, list[Linears | ExpertStacks]()
        self._ready = dict[tuple[int, AdapterRuns], Segments]()
        self.maker = Blocks(_KEPT)
        turns = {r: r.tables(torch.arange(program.n_positions).to(model.device)) for r in program.rotaries}
        biases = {alibi: alibi.bias(program.n_positions).to(model.device) for alibi in program.alibis}
        binding = Binding(model, packed, self.versions, turns, biases, self._ready, self._linears, stacks)
        self._bound = [Bound(operation, operation.bind(binding)) for operation in program.operations]
        self._plans: dict[Any, list[Call]] = {}
        self.native: NativeStep | None = None
        if kernel_isa() and model.device.type == "cpu" and model.dtype in ROWS:
            self.native = NativeStep(model.dtype, turns)
            for each in self._bound:
                self.native.add(each)

    def packed(self, effects: Effects) -> PackedEffects:
        """Return the packed effects of an adapter for `take`. Any thread may call it, also during a pass."""
        return self.packed_of(effects)[0]

    def packed_of(self, effects: Effects) -> tuple[PackedEffects, list[Factor]]:
        """Return the packed effects of an adapter, as `packed` does, and the low-rank factors in their block of memory.

        ``panels`` of each factor is the part of that block into which it was packed.
        """
        bottlenecks = {
            site: Bottleneck.of(record, self.dtype, self.device) for site, record in effects.residual.items()
        }
        packing = VersionPacking()
        owns = [linears.packed(effects, packing) for linears in self._linears]
        factors = packing.packer.run()
        changes = [None if own is None else GroupChange(own, self._for_step(own)) for own in owns]
        block, factors = self.maker.block(changes, factors)
        effects.linear, effects.residual = {}, {}  # what is needed of them has been packed
        return PackedEffects(effects, block, bottlenecks), factors

    def _for_step(self, own: OwnChanges) -> tuple[LayerChange, ...] | None:
        return None if self.native is None else changes_of(own, self.dtype)

    def fits(self, block: VersionBlock) -> bool:
        """Return True if a block's changes fit the groups of layers of this program."""
        return len(block.layout.changes) == len(self._linears) and all(
            change is None or _fits(linears, change, block)
            for linears, change in zip(self._linears, block.layout.changes, strict=True)
        )

    def take(self, version: str, packed: PackedEffects) -> None:
        """Add an adapter version."""
        if self.native is not None:
            self.native.take(version, packed)
        self.versions[version] = packed

    def drop(self, version: str) -> None:
        """Drop an adapter version, even after an interrupted `take`; an unknown version is ignored."""
        self.versions.pop(version, None)
        if self.native is None:
            return
        if version in self.native.partly:
            self._plans.clear()
        self.native.drop(version)

    def run(self, step: PassRows, given: Tensor) -> Tensor:
        """Return the logits (kept, vocabulary) of the kept rows, from ids (n,) or embeddings (n, width).

        ``step.tokens`` receives the argmax of the logits of the picked rows.
        """
        return self.rows(step, given).logits()

    @torch.no_grad()
    def rows(self, step: PassRows, given: Tensor) -> LogitRows:
        """Run the pass on ids (n,) or embeddings (n, width). Return the rows whose logits or hidden states are wanted.

        Both are computed when they are read: read them before the next pass.
        """
        self._ready.clear()
        self._ready.update(step.segments)
        frame: Frame = {"given": given}
        for operation in self._operations(step, by_ids=not given.is_floating_point()):
            operation(step, frame)
        return cast(LogitRows, frame["logits"])

    def segments(self, step: PassRows) -> dict[tuple[int, AdapterRuns], Segments]:
        """Return the low-rank pairs that act on a step's rows, for each group of layers and its runs of rows.

        On a CPU the result is empty, because the pairs' tables need no copy to the device.
        """
        if self.device.type == "cpu" or not step.versions:
            return {}
        *inner, head = self._linears
        asked = [(linears, step.runs) for linears in inner] + [(head, step.kept_runs), (head, step.picked_runs)]
        each = (((of.number, runs), of.segments(step.versions, runs)) for of, runs in asked)
        return {key: segments for key, segments in each if segments is not None}

    def _operations(self, step: PassRows, *, by_ids: bool = True) -> list[Call]:
        """Return the calls of a pass, in order. Consecutive operations that the C++ step supports are joined to one
        call.
        """
        if self.native is None:
            return list(self._bound)
        partly = self.native.partly and self.native.partly.intersection(step.versions)
        key = (frozenset(partly), type(step.cache), step.written is None, by_ids)
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = list(self.native.stretches(self._bound, step, by_ids=by_ids))
        return self._plans[key]


def _fits(linears: Linears | ExpertStacks, bare: GroupChange, block: VersionBlock) -> bool:
    """Return True if an adapter's packed changes fit the number and sizes of the layers.

    The indices of sparse changes are checked too, because a damaged file may hold wrong indices.
    """
    if not bare.own.terms and not any(_step_terms(bare)):
        return linears.fits(bare.own)
    change = block.change(linears.number)
    return change is not None and linears.fits(change.own) and linears.takes(_step_terms(change) or change.own.terms)


def _step_terms(change: GroupChange) -> list[LayerTerms | None]:
    return [layer.terms for layer in change.step or ()]
