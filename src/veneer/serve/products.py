"""Linear layers that read the same x, with what adapter versions do to them: on packed weights, or on any others.

Rows of several versions go through together. Where a version has a weight of its own, its rows are computed again by
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from veneer.core.frozen import FrozenWeight
from veneer.core.linear import behind_a
from veneer.core.records import LinearDelta
from veneer.model.blueprint.parts import Linear
from veneer.model.linear import frozen_weight
from veneer.model.packed_linear import PackedGroup
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.linear.layer import NOTHING, LinearLayer, Weight
from veneer.ops.linear.op import forward
from veneer.ops.linear.scales import finished, scaled_input
from veneer.ops.pairs import PackedPairs, Pair, Segment, add_pairs
from veneer.quant.dense import DenseWeight
from veneer.serve.effects import Effects

Packed = Mapping[tuple[str, ...], PackedGroup]
"""Packed weights by the paths of the layers that read the same x."""


@dataclass(frozen=True, slots=True)
class _Own:
    """One version at a group of layers: its records, and the whole weights that it has instead of theirs.

    ``pairs`` are the low-rank parts of all layers, or of each where one of them scales its input. Records that they
    are taken from have them no more.
    """

    records: tuple[LinearDelta, ...]
    whole: Mapping[int, Tensor]
    pairs: PackedPairs | None = None
    apart: tuple[PackedPairs | None, ...] = ()

    @property
    def only_adds(self) -> bool:
        """Whether it does nothing but add low-rank parts to what the layers give."""
        return not self.whole and not self.apart and all(record is NOTHING for record in self.records)


class Linears:
    """The layers at some paths."""

    def __init__(self, model: PreTrainedModel, linears: Sequence[Linear], packed: Packed) -> None:
        self.paths = tuple(linear.path for linear in linears)
        modules = [model.get_submodule(path) for path in self.paths]
        self.group = packed.get(self.paths)
        self.weights = [_weight(frozen_weight(module)) for module in modules]
        self.biases = [cast("Tensor | None", module._parameters.get("bias")) for module in modules]
        self.versions: dict[str, _Own] = {}
        self.bias = _joined(self.biases, [linear.out_features for linear in linears])

    def take(self, version: str, effects: Effects) -> None:
        """A version comes, if it does anything here."""
        records = tuple(effects.linear.get(path, NOTHING) for path in self.paths)
        whole = {i: w for i, path in enumerate(self.paths) if (w := effects.whole.get((path, "weight"))) is not None}
        if whole or any(record is not NOTHING for record in records):
            own = _Own(records, whole)
            self.versions[version] = own if self.group is None else self._packed(own)

    def drop(self, version: str) -> None:
        """A version goes."""
        self.versions.pop(version, None)

    def __call__(
        self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns, onto: Tensor | None = None
    ) -> list[Tensor]:
        """What each layer gives, added to ``onto`` where that is given: `adds` must hold then."""
        owns = [self.versions.get(version) for version in versions]
        group = self.group
        if group is None:
            ys = self._by_op(x, owns, runs)
        elif not any(owns):
            return self._products(x, group, onto)
        elif all(own is None or own.only_adds for own in owns):
            ys = self._products(x, group, onto)
            add_pairs(x, _segments(owns, runs), ys)
            return ys
        else:
            ys = self._packed_products(x, owns, runs, group)
        self._put_whole(ys, x, owns, runs)
        return ys

    def adds(self, versions: tuple[str, ...]) -> bool:
        """Whether these versions do nothing here that keeps the output from being added to something at once."""
        if self.group is None or self.bias is not None:
            return False
        return all(own is None or own.only_adds for own in map(self.versions.get, versions))

    def _products(self, x: Tensor, group: PackedGroup, onto: Tensor | None) -> list[Tensor]:
        """The layers alone."""
        if group.whole is None:
            biases = self.biases if onto is None else [onto]
            each = zip(group.parts, biases, strict=True)
            return [part.matmul(x, onto=_rows(bias, len(x))) for part, bias in each]
        y = group.whole.matmul(x, onto=_rows(self.bias, len(x)))
        return list(y.split(group.heights, dim=1))

    def _packed_products(
        self, x: Tensor, owns: Sequence[_Own | None], runs: AdapterRuns, group: PackedGroup
    ) -> list[Tensor]:
        """The layers with records that scale, or have biases, or share their factors."""
        layers = [self._layer(i, owns, runs) for i in range(len(self.paths))]
        inputs = [scaled_input(x, layer) for layer in layers]
        ys = [part.matmul(own) for part, own in zip(group.parts, inputs, strict=True)]
        add_pairs(x, _segments(owns, runs), ys)
        for place, start, stop in runs.runs:
            own = owns[place]
            if own is not None:
                self._add_apart(own, slice(start, stop), inputs, ys)
        return [finished(y, layer) for y, layer in zip(ys, layers, strict=True)]

    def _add_apart(self, own: _Own, rows: slice, inputs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        for i, record in enumerate(own.records):
            x, y = inputs[i][rows], ys[i][rows]
            if record.a is not None:
                y += behind_a(functional.linear(x.to(record.a.dtype), record.a), record).to(y.dtype)
            if own.apart and (pairs := own.apart[i]) is not None:
                add_pairs(x, [Segment(pairs, 0, len(x))], [y])

    def _by_op(self, x: Tensor, owns: Sequence[_Own | None], runs: AdapterRuns) -> list[Tensor]:
        """By the op of training: weights in any format."""
        return list(forward(x, [self._layer(i, owns, runs) for i in range(len(self.paths))])[0])

    def _layer(self, i: int, owns: Sequence[_Own | None], runs: AdapterRuns) -> LinearLayer:
        records = tuple(NOTHING if own is None else own.records[i] for own in owns)
        if all(record is NOTHING for record in records):
            return LinearLayer(weight=self.weights[i], bias=self.biases[i])
        return LinearLayer(weight=self.weights[i], bias=self.biases[i], records=records, runs=runs)

    def _put_whole(self, ys: list[Tensor], x: Tensor, owns: Sequence[_Own | None], runs: AdapterRuns) -> None:
        for place, start, stop in runs.runs:
            own = owns[place]
            for i, weight in own.whole.items() if own is not None else ():
                bias = self.biases[i] if own is None or own.records[i].bias is None else own.records[i].bias
                ys[i][start:stop] = functional.linear(x[start:stop], weight, bias)

    def _packed(self, own: _Own) -> _Own:
        """With its low-rank parts packed; those that share their factors with other layers stay as they are."""
        taken = [_is_pair(record) for record in own.records]
        pairs = [
            Pair(cast(Tensor, record.a), cast(Tensor, record.b), record.scale) if is_pair else None
            for record, is_pair in zip(own.records, taken, strict=True)
        ]
        left = tuple(
            _without_pair(record) if is_pair else record for record, is_pair in zip(own.records, taken, strict=True)
        )
        sizes, dtype = [weight.shape[0] for weight in self.weights], self._dtype()
        if not any(taken):
            return replace(own, records=left)
        if any(record.in_scale is not None for record in own.records):
            each = zip(pairs, sizes, strict=True)
            apart = tuple(None if pair is None else PackedPairs.pack([pair], [o], dtype=dtype) for pair, o in each)
            return replace(own, records=left, apart=apart)
        return replace(own, records=left, pairs=PackedPairs.pack(pairs, sizes, dtype=dtype))

    def _dtype(self) -> torch.dtype:
        return cast(PackedGroup, self.group).parts[0].dtype


def _is_pair(record: LinearDelta) -> bool:
    """Whether a record's low-rank part is its own: VeRA's layers share theirs."""
    return record.rank > 0 and record.core is None and record.b_scale is None


def _without_pair(record: LinearDelta) -> LinearDelta:
    left = replace(record, a=None, b=None, scale=1.0)
    return NOTHING if all(x is None for x in (left.in_scale, left.out_scale, left.bias)) else left


def _segments(owns: Sequence[_Own | None], runs: AdapterRuns) -> list[Segment]:
    found = []
    for place, start, stop in runs.runs:
        own = owns[place]
        if own is not None and own.pairs is not None:
            found.append(Segment(own.pairs, start, stop))
    return found


def _rows(bias: Tensor | None, n: int) -> Tensor | None:
    return bias if bias is None or bias.ndim == 2 else bias.expand(n, -1)


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    there = next((bias for bias in biases if bias is not None), None)
    if there is None:
        return None
    return torch.cat([there.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)])


def _weight(weight: FrozenWeight) -> Weight:
    """A dense weight as the tensor that it is, the model's own."""
    return weight.dense() if isinstance(weight, DenseWeight) else weight
