"""Interpreter of a program: its instructions bound to a model's weights, in C++ if the native step supports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.blueprint.parts import Linear
from veneer.ops.cpu.step import LayerChange
from veneer.ops.dispatch import kernel_isa
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.packed import ROWS
from veneer.ops.pairs import Factor, Segments
from veneer.ops.terms import LayerTerms
from veneer.serve.program.block import Blocks, VersionBlock
from veneer.serve.program.block_layout import GroupChange
from veneer.serve.program.bottleneck import Bottleneck
from veneer.serve.program.bound import (
    Activated,
    Added,
    Attended,
    Bound,
    BoundEmbedding,
    ByModule,
    Changed,
    Frame,
    HeadsOf,
    IntoStream,
    IntoStreamOf,
    Joined,
    LogitRows,
    LogitsOf,
    Normed,
    Picked,
    Products,
    Seeing,
    SelfAttention,
    joined,
)
from veneer.serve.program.effects import Effects
from veneer.serve.program.native import NativeStep
from veneer.serve.program.native_parts import changes_of
from veneer.serve.program.norms import BoundNorm
from veneer.serve.program.products import Linears, OwnChanges, Packed, VersionPacking
from veneer.serve.program.program import Activate, Add, Embed, Logits, Normalize, Product, Program, StreamChange
from veneer.serve.program.program import ByOwnModule as OwnModule
from veneer.serve.program.step import PassRows

MOST_PLANS = 64
_KEPT = 512  # layouts of blocks


@dataclass(frozen=True, slots=True)
class PackedEffects:
    """Effects of an adapter, with their packed parts: the block of the linear layers, and each bottleneck."""

    effects: Effects
    linears: VersionBlock
    bottlenecks: dict[str, Bottleneck]


class Interpreter:
    """Program on a model's weights, or on ``packed`` ones, with the ``effects`` and ``blocks`` of adapters by version.

    ``native`` is the step in C++, which gives the same bits. It is None without kernels, or for rows in a dtype or on a
    device that they do not support.
    """

    def __init__(self, model: PreTrainedModel, program: Program, packed: Packed) -> None:
        self.program, self.dtype, self.device = program, model.dtype, model.device
        self.effects: dict[str, Effects] = {}
        self.blocks: dict[str, VersionBlock] = {}
        self.bottlenecks: dict[str, dict[str, Bottleneck]] = {}
        self._packed, self._linears = packed, list[Linears]()
        self._ready = dict[tuple[int, AdapterRuns], Segments]()
        self.maker = Blocks(_KEPT)
        self._turns = {r: r.tables(torch.arange(program.n_positions).to(model.device)) for r in program.rotaries}
        self._bound = [bound for each in joined(program.instructions) for bound in self._bind(model, each)]
        self._plans: dict[Any, list[Bound]] = {}
        self.native: NativeStep | None = None
        if kernel_isa() and model.device.type == "cpu" and model.dtype in ROWS:
            self.native = NativeStep(program.head.linear.in_features, model.dtype, self._turns)
            for bound in self._bound:
                self.native.add(bound)

    def packed(self, effects: Effects) -> PackedEffects:
        """Return the packed effects of an adapter for `take`; on any thread, also during a pass."""
        return self.packed_of(effects)[0]

    def packed_of(self, effects: Effects) -> tuple[PackedEffects, list[Factor]]:
        """Return the packed effects of an adapter as `packed` does, and its factors with their places in the block."""
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
        """Return True if a block has changes for the groups of layers of this program."""
        return len(block.layout.changes) == len(self._linears) and all(
            change is None or _fits(linears, change, block)
            for linears, change in zip(self._linears, block.layout.changes, strict=True)
        )

    def take(self, version: str, packed: PackedEffects) -> None:
        """Add an adapter version."""
        self.blocks[version] = packed.linears
        self.bottlenecks[version] = packed.bottlenecks
        if self.native is not None:
            self.native.take(version, packed.linears, packed.effects, packed.bottlenecks)
        self.effects[version] = packed.effects

    def drop(self, version: str) -> None:
        """Drop an adapter version, also after an interrupted `take`; an unknown version is ignored."""
        self.effects.pop(version, None)
        self.blocks.pop(version, None)
        self.bottlenecks.pop(version, None)
        if self.native is None:
            return
        if version in self.native.partly:
            self._plans.clear()
        self.native.drop(version)

    def run(self, step: PassRows, given: Tensor) -> Tensor:
        """Return the logits (kept, vocabulary) of the kept rows, from ids (n,) or embeddings (n, width).

        ``step.tokens`` receives the likeliest tokens of the picked rows.
        """
        return self.rows(step, given).logits()

    @torch.no_grad()
    def rows(self, step: PassRows, given: Tensor) -> LogitRows:
        """Return the kept rows, whose logits are to be asked for before the next pass."""
        self._ready.clear()
        self._ready.update(step.segments)
        frame: Frame = {"given": given}
        for instruction in self._instructions(step, by_ids=not given.is_floating_point()):
            instruction(step, frame)
        return cast(LogitRows, frame["logits"])

    def segments(self, step: PassRows) -> dict[tuple[int, AdapterRuns], Segments]:
        """Return the low-rank pairs of a step's rows at all groups of layers, if their numbers go to another device."""
        if self.device.type == "cpu" or not step.versions:
            return {}
        *inner, head = self._linears
        asked = [(linears, step.runs) for linears in inner] + [(head, step.kept_runs), (head, step.picked_runs)]
        each = (((of.number, runs), of.segments(step.versions, runs)) for of, runs in asked)
        return {key: segments for key, segments in each if segments is not None}

    def _instructions(self, step: PassRows, *, by_ids: bool = True) -> list[Bound]:
        """Those of a pass, in stretches where the step in C++ knows them."""
        if self.native is None:
            return self._bound
        partly = self.native.partly and self.native.partly.intersection(step.versions)
        key = (frozenset(partly), type(step.cache), step.written is None, by_ids)
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = list(self.native.stretches(self._bound, step, by_ids=by_ids))
        return self._plans[key]

    def _linears_of(self, model: PreTrainedModel, linears: tuple[Linear, ...]) -> Linears:
        found = Linears(model, linears, self._packed, self.blocks, len(self._linears), self._ready)
        self._linears.append(found)
        return found

    def _bind(self, model: PreTrainedModel, instruction: Joined) -> list[Bound]:
        if isinstance(instruction, Logits):
            head = self._linears_of(model, (instruction.head.linear,))
            logits = LogitsOf(model, instruction, head, self.effects)
            return [Picked(logits), logits]
        return [self._bind_one(model, instruction)]

    def _bind_one(self, model: PreTrainedModel, instruction: Joined) -> Bound:
        match instruction:
            case IntoStream():
                return IntoStreamOf(self._linears_of(model, instruction.product.linears), instruction, self.bottlenecks)
            case Seeing(heads, attend):
                return SelfAttention(HeadsOf(model, heads, self._turns), Attended(attend))
            case Embed():
                return BoundEmbedding(model, instruction, self.effects)
            case Normalize():
                return Normed(BoundNorm(model, instruction.norm, self.effects), instruction.source, instruction.target)
            case Product():
                return Products(self._linears_of(model, instruction.linears), instruction)
            case Activate():
                return Activated(instruction)
            case StreamChange():
                return Changed(instruction, self.bottlenecks)
            case OwnModule():
                return ByModule(model, instruction)
            case Add():
                return Added(instruction)
        raise TypeError(f"no such instruction: {instruction}")


def _fits(linears: Linears, bare: GroupChange, block: VersionBlock) -> bool:
    """Return True if changes fit layers. Places in sparse terms are values, which a damaged file may have wrong."""
    if not bare.own.terms and not any(_step_terms(bare)):
        return linears.fits(bare.own)
    change = block.change(linears.number)
    return change is not None and linears.fits(change.own) and linears.takes(_step_terms(change) or change.own.terms)


def _step_terms(change: GroupChange) -> list[LayerTerms | None]:
    return [layer.terms for layer in change.step or ()]
