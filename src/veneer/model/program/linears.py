"""Linear layers that read the same x, with the changes of adapter versions: on packed weights, or on any others.

Rows of several versions are computed together. If a version replaces a weight, its rows are computed again on their
own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from veneer.model.blueprint.parts import Linear
from veneer.model.program.version import Effects, OwnChanges, Versions
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.quantized.packed_linear import PackedGroup
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.ops.linear.around import finished, mapped_input
from veneer.ops.linear.change import add_changes
from veneer.ops.linear.layer import NOTHING, LinearLayer, Weight
from veneer.ops.linear.op import forward
from veneer.ops.packed import ROWS, PackedWeight, over_rows
from veneer.ops.pairs import FactorPair, PackedPairs, PairsPacker, Segment, Segments, add_pairs
from veneer.ops.terms import LayerTerms, PackedTerm, apply_term, times_weight
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight

Packed = Mapping[tuple[str, ...], PackedGroup]
"""Packed weights by the paths of the layers that read the same x."""


@dataclass(frozen=True, slots=True)
class VersionPacking:
    """State while one version is packed: groups of layers are added to ``packer`` one by one, and then the packer runs.

    ``shared`` are the packed factors that several groups use, keyed by the memory of the unpacked tensors.
    """

    packer: PairsPacker = field(default_factory=PairsPacker)
    shared: dict[tuple[object, ...], PackedPairs] = field(default_factory=dict)


Ready = Mapping[tuple[int, AdapterRuns], Segments]
"""Segments of the rows of a step by the number of a group and its runs, if their numbers are not to be sent again."""


class Linears:
    """Group of linear layers that read one input, with the changes of adapter versions.

    ``versions`` hold each version's changes of all groups, by number; ``number`` is that of this group. ``ready`` holds
    how rows are divided by version, if that was computed before the pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Sequence[Linear],
        packed: Packed,
        versions: Versions,
        number: int = 0,
        ready: Ready = MappingProxyType({}),
    ) -> None:
        self.versions, self.number, self._ready = versions, number, ready
        self.paths, self.device = tuple(linear.path for linear in linears), model.device
        modules = [model.get_submodule(path) for path in self.paths]
        self.group = packed.get(self.paths)
        self.weights = [_weight(frozen_weight(module)) for module in modules]
        self.biases = [cast("Tensor | None", module._parameters.get("bias")) for module in modules]
        self.bias = _joined(self.biases, [linear.out_features for linear in linears])

    def packed(self, effects: Effects, packing: VersionPacking) -> OwnChanges | None:
        """Return the packed changes of a version, or None if it changes nothing in this group. Any
        thread may call it.
        """
        records = tuple(effects.linear.get(path, NOTHING) for path in self.paths)
        whole = {i: w for i, path in enumerate(self.paths) if (w := effects.whole.get((path, "weight"))) is not None}
        if not whole and all(record is NOTHING for record in records):
            return None
        own = OwnChanges(records, whole)
        return own if self.group is None else self._packed(own, packing)

    def fits(self, own: OwnChanges) -> bool:
        """Return True if a version's packed changes fit the number and sizes of the layers."""
        if self.group is None or len(own.records) != len(self.paths):
            return False
        sizes, pairs = tuple(weight.shape[0] for weight in self.weights), own.pairs
        if pairs is not None and (pairs.out_features, pairs.in_features) != (sizes, self.weights[0].shape[1]):
            return False
        return not own.terms or self.takes(own.terms)

    def takes(self, terms: Sequence[LayerTerms | None]) -> bool:
        """Return True if ``terms``, a version's packed changes other than low-rank pairs, fit this group: one item (or
        None) for each layer, of the layer's sizes.
        """
        return len(terms) == len(self.weights) and all(
            each is None or each.fits(*weight.shape) for each, weight in zip(terms, self.weights, strict=True)
        )

    def own(self, version: str) -> OwnChanges | None:
        """Return a version's changes of this group, or None if there are none."""
        known = self.versions.get(version)
        return None if known is None else known.linears.own(self.number)

    def __call__(self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> list[Tensor]:
        """Return the output of each layer."""
        owns = [self.own(version) for version in versions]
        group = self.group
        if group is None:
            return self._by_op(x, owns, runs)
        apart = tuple(own is not None and not own.only_adds for own in owns)
        if not any(apart):
            return self._sums(x, owns, runs, group)
        if not x.is_cpu:  # where to divide rows takes numbers of the host
            return self._by_records(x, owns, runs, group)
        # A row is computed in one way, whatever the others need.
        plain, others = divided(runs, apart)
        if not len(plain.rows):
            return self._by_records(x, owns, runs, group)
        ys = [x.new_empty(len(x), height) for height in group.heights]
        for part, compute in ((plain, self._sums), (others, self._by_records)):
            for y, given in zip(ys, compute(x[part.rows], owns, part.runs, group), strict=True):
                y[part.rows] = given
        return ys

    def onto(self, h: Tensor, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> Tensor:
        """Return the sum of ``h`` and the single layer's output. `adds` must be True for each version."""
        y = cast(PackedGroup, self.group).parts[0].matmul(x, onto=h, out=None if h.is_cpu else h)
        add_pairs(x, self._segments([self.own(version) for version in versions], runs), [y])
        return y

    def segments(self, versions: tuple[str, ...], runs: AdapterRuns) -> Segments | None:
        """Return how rows are divided by version for the low-rank kernels, or None if no version has low-rank pairs
        here.
        """
        found = _segments([self.own(version) for version in versions], runs)
        return Segments.of(found) if found else None

    def _segments(self, owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> Segments | list[Segment]:
        return self._ready.get((self.number, runs)) or _segments(owns, runs)

    def adds(self, version: str | None = None) -> bool:
        """Return True if `onto` can compute the rows of a version; without one, the base's rows."""
        if self.group is None or self.bias is not None:
            return False
        own = None if version is None else self.own(version)
        return own is None or (own.only_adds and not own.scales)

    def _sums(
        self, x: Tensor, owns: Sequence[OwnChanges | None], runs: AdapterRuns, group: PackedGroup
    ) -> list[Tensor]:
        """Return the outputs of the layers for rows whose adapter versions have only low-rank parts: the products with
        the weights, plus these parts.
        """
        ys = self._products(x, group)
        add_pairs(x, self._segments(owns, runs), ys)
        return ys

    def _products(self, x: Tensor, group: PackedGroup) -> list[Tensor]:
        """Return the outputs of the layers without adapters."""
        if group.whole is None:
            each = zip(group.parts, self.biases, strict=True)
            return [part.matmul(x, onto=over_rows(bias, len(x))) for part, bias in each]
        y = group.whole.matmul(x, onto=over_rows(self.bias, len(x)))
        return list(torch.split(y, group.heights, dim=1))

    def _by_records(
        self, x: Tensor, owns: Sequence[OwnChanges | None], runs: AdapterRuns, group: PackedGroup
    ) -> list[Tensor]:
        """Return the outputs of layers whose adapter versions have more than low-rank parts: scales, biases, other
        changes, or weights of their own.
        """
        layers = [self._layer(i, owns, runs) for i in range(len(self.paths))]
        inputs = [mapped_input(x, layer) for layer in layers]
        for i, rows, terms in _terms(owns, runs):
            if terms.input is not None:
                inputs[i] = inputs[i].clone() if inputs[i] is x else inputs[i]
                apply_term(terms.input, inputs[i][rows], inputs[i][rows], add=False)
        if group.whole is not None and not x.is_cpu and all(own is x for own in inputs):
            ys = list(torch.split(group.whole.matmul(x), group.heights, dim=1))
        else:
            ys = [part.matmul(own) for part, own in zip(group.parts, inputs, strict=True)]
        add_pairs(x, self._segments(owns, runs), ys)
        for place, start, stop in runs.runs:
            own = owns[place]
            if own is not None:
                self._add_apart(own, slice(start, stop), inputs, ys)
        for y, own_x, layer in zip(ys, inputs, layers, strict=True):
            add_changes(y, own_x, layer)
        for i, rows, terms in _terms(owns, runs):
            for term in terms.adds:
                _add_term(term, group.parts[i], inputs[i][rows], ys[i][rows])
            if terms.output is not None:
                apply_term(terms.output, ys[i][rows], ys[i][rows], add=False)
        ys = [finished(y, layer) for y, layer in zip(ys, layers, strict=True)]
        self._put_whole(ys, x, owns, runs)
        return ys

    def _add_apart(self, own: OwnChanges, rows: slice, inputs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        for x, y, pairs in zip(inputs, ys, own.apart, strict=False):
            if pairs is not None:
                add_pairs(x[rows], [Segment(pairs, 0, rows.stop - rows.start)], [y[rows]])

    def _by_op(self, x: Tensor, owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> list[Tensor]:
        """Return the layers' outputs, computed by the op that training uses. This works for weights in any format,
        packed or not.
        """
        ys = list(forward(x, [self._layer(i, owns, runs) for i in range(len(self.paths))])[0])
        self._put_whole(ys, x, owns, runs)
        return ys

    def _layer(self, i: int, owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> LinearLayer:
        records = tuple(NOTHING if own is None else own.records[i] for own in owns)
        if all(record is NOTHING for record in records):
            return LinearLayer(weight=self.weights[i], bias=self.biases[i], rows_alone=True)
        return LinearLayer(weight=self.weights[i], bias=self.biases[i], records=records, runs=runs, rows_alone=True)

    def _put_whole(self, ys: list[Tensor], x: Tensor, owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> None:
        for place, start, stop in runs.runs:
            own = owns[place]
            for i, weight in own.whole.items() if own is not None else ():
                bias = self.biases[i] if own is None or own.records[i].bias is None else own.records[i].bias
                own_x = x[start:stop]
                if isinstance(weight, PackedWeight):
                    weight.matmul(own_x, onto=over_rows(bias, len(own_x)), out=ys[i][start:stop])
                else:
                    ys[i][start:stop] = functional.linear(own_x, weight, bias)

    def _packed(self, own: OwnChanges, packing: VersionPacking) -> OwnChanges:
        """Return the changes of one adapter version with low-rank parts, whole weights and supported terms packed for
        the kernels.
        """
        pairs = [_pair(record) for record in own.records]
        whole = {i: self._packed_weight(cast(Tensor, w)) for i, w in own.whole.items()}
        left = self._with_terms(replace(own, records=tuple(map(_without_pair, own.records)), whole=whole))
        if not any(pairs):
            return left
        sizes = [weight.shape[0] for weight in self.weights]
        if any(record.input is not None for record in own.records):
            each = zip(pairs, sizes, strict=True)
            apart = tuple(None if pair is None else self._pack([pair], [o], packing) for pair, o in each)
            return replace(left, apart=apart)
        packed = self._pack(pairs, sizes, packing)
        scaling = self._scaling(left, packed)
        if scaling is not None:
            return replace(left, records=(NOTHING,) * len(left.records), pairs=scaling)
        return replace(left, pairs=packed)

    def _scaling(self, left: OwnChanges, packed: PackedPairs) -> PackedPairs | None:
        """Return ``packed`` pairs that also multiply the outputs by the records' scales. Return None on a CPU, or if
        the layers have a bias, or if a record has other effects than such a scale.
        """
        scaled = all(
            record is NOTHING or (record.only_scales and record.input is None and record.bias is None)
            for record in left.records
        )
        if self.device.type == "cpu" or self.bias is not None or left.whole or not scaled:
            return None
        return packed.scaling([record.output_scale for record in left.records])

    def _with_terms(self, own: OwnChanges) -> OwnChanges:
        """Return the changes with those parts of the records packed that the CPU's kernels support, such as rotations
        and scales of the input. On a GPU, return them unchanged.
        """
        if self.device.type != "cpu":
            return own
        parts = cast(PackedGroup, self.group).parts
        taken = [
            LayerTerms.taken(record, reads_weight=isinstance(part, PackedWeight))
            for record, part in zip(own.records, parts, strict=True)
        ]
        terms = tuple(each for each, _ in taken)
        records = tuple(NOTHING if record.changes_nothing else record for _, record in taken)
        return replace(own, records=records, terms=terms) if any(terms) else own

    def _packed_weight(self, weight: Tensor) -> Tensor | PackedWeight:
        return weight if not weight.is_cpu else PackedWeight.pack(weight)

    def _pack(self, pairs: Sequence[FactorPair | None], sizes: Sequence[int], packing: VersionPacking) -> PackedPairs:
        if all(pair is None or pair.is_plain for pair in pairs):
            return packing.packer.add(pairs, sizes, self._dtype())
        key = tuple(None if pair is None else (*_place(pair.a), *_place(pair.b), pair.scale) for pair in pairs)
        like = packing.shared.get(key)
        if like is not None:
            return like.with_vectors(pairs)
        return packing.shared.setdefault(key, packing.packer.add(pairs, sizes, self._dtype()))

    def _dtype(self) -> torch.dtype:
        return cast(PackedGroup, self.group).parts[0].dtype


class RowPart(NamedTuple):
    """Some rows of a pass, with the runs of versions among them."""

    rows: Tensor
    runs: AdapterRuns


@functools.lru_cache(maxsize=64)
def divided(runs: AdapterRuns, apart: tuple[bool, ...]) -> tuple[RowPart, RowPart]:
    """Divide the rows of a pass in two. ``apart`` says for each version whether its rows are in the second part."""
    rows: tuple[list[int], list[int]] = ([], [])
    found: tuple[list[Run], list[Run]] = ([], [])
    for place, start, stop in runs.with_gaps():
        side = int(place >= 0 and apart[place])
        if place >= 0:
            found[side].append(Run(place, len(rows[side]), len(rows[side]) + stop - start))
        rows[side].extend(range(start, stop))
    plain, others = (
        RowPart(torch.tensor(r, dtype=torch.long), AdapterRuns(tuple(f), len(r)))
        for r, f in zip(rows, found, strict=True)
    )
    return plain, others


def each_alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows (n, i) by a weight (o, i). On a CPU, a row's result does not depend on n.

    torch's product of a row may depend on how many rows there are.
    """
    if not x.is_cpu or x.dtype not in ROWS:
        return functional.linear(x, weight, bias)
    return PackedWeight.pack(weight).matmul(x, onto=over_rows(bias, len(x)))


def _pair(record: LinearDelta) -> FactorPair | None:
    pair = record.low_rank
    if pair is None or not pair.rank:
        return None
    return FactorPair(pair.a, pair.b, pair.scale, core=pair.core, b_scale=pair.b_scale)


def _place(x: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tensors that read the same memory in the same way: address, shape, strides and
    dtype.
    """
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _without_pair(record: LinearDelta) -> LinearDelta:
    left = record.without_pair()
    return NOTHING if left.changes_nothing else left


def _terms(owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> Iterator[tuple[int, slice, LayerTerms]]:
    """Yield the packed terms of each run of rows with one adapter version, once for each layer that has some: the
    layer's index, the rows and the terms.
    """
    for place, start, stop in runs.runs:
        own = owns[place]
        for i, terms in enumerate(() if own is None else own.terms):
            if terms is not None:
                yield i, slice(start, stop), terms


def _add_term(term: PackedTerm, weight: object, x: Tensor, y: Tensor) -> None:
    if term.kind == "hadamard" and isinstance(weight, PackedWeight):
        times_weight(term, weight).matmul(x, onto=y, out=y)
    else:
        apply_term(term, x, y, add=True)


def _segments(owns: Sequence[OwnChanges | None], runs: AdapterRuns) -> list[Segment]:
    found = []
    for place, start, stop in runs.runs:
        own = owns[place]
        if own is not None and own.pairs is not None:
            found.append(Segment(own.pairs, start, stop))
    return found


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    there = next((bias for bias in biases if bias is not None), None)
    if there is None:
        return None
    return torch.cat([there.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)])


def _weight(weight: FrozenWeight) -> Weight:
    """Return the tensor of a dense weight, and any other weight unchanged."""
    return weight.dense() if isinstance(weight, DenseWeight) else weight
