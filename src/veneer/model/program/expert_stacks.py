"""Layers of all experts of a mixture, with the changes of adapter versions: low-rank pairs of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.adapted.experts import run_experts
from veneer.model.adapted.state import base_alone
from veneer.model.blueprint.parts import Stack
from veneer.model.program.linears import VersionPacking
from veneer.model.program.version import Effects, OwnChanges, Versions
from veneer.ops.experts import ExpertSegment, PackedStack, fits_stack
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.linear.layer import NOTHING
from veneer.ops.pairs import PackedPairs
from veneer.ops.terms import LayerTerms
from veneer.records.deltas import LinearDelta

Stacks = tuple[PackedStack, PackedStack]
"""Packed layers of the experts of a mixture: gate and up, and down."""


class ExpertStacks:
    """Layers of all experts of a mixture: gate and up together, and down. Versions add their own low-rank pairs.

    ``versions`` hold each version's changes of all groups of layers, by number; ``number`` is that of these experts.
    ``packed`` are the base's packed weights; if they are None, the model's own module computes the experts' outputs.
    """

    def __init__(
        self, model: PreTrainedModel, stacks: Sequence[Stack], packed: Stacks | None, versions: Versions, number: int
    ) -> None:
        self.versions, self.number, self.weights = versions, number, packed
        self.paths = tuple(stack.path for stack in stacks)
        self._model = model

    def packed(self, effects: Effects, packing: VersionPacking) -> OwnChanges | None:
        """Return the packed changes of a version, or None if it changes no expert. Any thread may call it."""
        records = tuple(effects.linear.get(path, NOTHING) for path in self.paths)
        if all(record is NOTHING for record in records):
            return None
        if self.weights is None:
            return OwnChanges(records, {})
        dtype = self.weights[0].dtype
        apart = list[PackedPairs | None]()
        for record in records:
            pair = record.low_rank
            pair = None if pair is None or not pair.rank else pair.plain
            apart.append(None if pair is None else packing.packer.add_experts(pair.a, pair.b, pair.scale, dtype))
        return OwnChanges((NOTHING,) * len(records), {}, apart=tuple(apart))

    def fits(self, own: OwnChanges) -> bool:
        """Return True if a version's packed changes fit the number and sizes of the experts."""
        if self.weights is None or len(own.apart) != len(self.weights) or len(own.records) != len(self.weights):
            return False
        each = zip(own.apart, self.weights, strict=True)
        return own.pairs is None and all(pairs is None or fits_stack(pairs, stack) for pairs, stack in each)

    def takes(self, terms: Sequence[LayerTerms | None]) -> bool:
        """Return True if ``terms``, a version's packed changes other than low-rank pairs, are all None. Experts support
        no such changes.
        """
        return not any(terms)

    def segments(self, versions: tuple[str, ...], runs: AdapterRuns) -> None:
        """Return None. Unlike the rows of `Linears`, those of experts cannot be divided before the pass, because the
        router chooses the experts within it.
        """

    def expert_segments(self, versions: tuple[str, ...], runs: AdapterRuns) -> list[ExpertSegment]:
        """Return the rows of each version that changes the packed experts, with its pairs."""
        found = []
        for place, start, stop in runs.runs:
            own = self._own(versions[place])
            if own is not None:
                found.append(ExpertSegment(cast("tuple[PackedPairs, PackedPairs]", own.apart), start, stop))
        return found

    def by_module(
        self, x: Tensor, ids: Tensor, factors: Tensor, versions: tuple[str, ...], runs: AdapterRuns
    ) -> Tensor:
        """Return the weighted sums of the experts' outputs, computed by the model's own module. The rows of each
        version are computed separately.
        """
        module, y = self._model.get_submodule(self.paths[0].rpartition(".")[0]), x.new_empty(x.shape)
        for place, start, stop in runs.with_gaps():
            own, rows = None if place < 0 else self._own(versions[place]), slice(start, stop)
            given = x[rows], ids[rows], factors[rows]
            if own is None:
                with base_alone(self._model):  # it may get adapters later
                    y[rows] = module(*given)
            else:
                y[rows] = run_experts(module, *given, self._records(own))
        return y

    def _records(self, own: OwnChanges) -> dict[str, LinearDelta]:
        names = (path.rpartition(".")[2] for path in self.paths)
        return {name: each for name, each in zip(names, own.records, strict=True) if each is not NOTHING}

    def _own(self, version: str) -> OwnChanges | None:
        known = self.versions.get(version)
        return None if known is None else known.linears.own(self.number)
