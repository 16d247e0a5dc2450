"""Frozen linear layer with the records that act on it, the input of `ops.linear.op`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.terms.scale import Scale

Weight = Float[Tensor, "o i"] | FrozenWeight
NOTHING = LinearDelta()
MANY_ROWS = 64
"""Fewer go through a term's own product, in its own dtype: to round it or to make a matrix of it saves no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """Frozen layer ``W (o, i)`` with its bias, and the adapters' changes of it (``records``).

    Without ``runs`` there is at most one record, which acts on all rows. With ``runs``, each run of rows has the index
    of its record; rows in no run have none. A row may be many tokens. ``masks`` are dropout masks, one for each record,
    on the input of the terms that it adds to the weight; if there are none, nothing is dropped. With ``rows_alone``, a
    row's result does not depend on the number of rows, as serving requires.

    A record's tensors may be wider than x (float32 with bf16). Low-rank pairs are rounded for the products, which
    accumulate in float32. Kernels apply linear maps of many rows in float32 (`forms`). If there is no such kernel,
    changes of many rows are rounded unless they would lose accuracy. Of a block-diagonal rotation, the difference from
    the identity is rounded. Other terms are not rounded. Gradients are in the tensors' own dtype.
    """

    weight: Weight
    bias: Float[Tensor, " o"] | None = None
    records: tuple[LinearDelta, ...] = ()
    runs: AdapterRuns | None = None
    masks: tuple[Mask | None, ...] = ()
    rows_alone: bool = False

    @property
    def record(self) -> LinearDelta:
        """Record that acts on all rows."""
        return self.records[0] if self.records else NOTHING

    @property
    def maps_input(self) -> bool:
        """Return True if a record scales or rotates the input, so that the weight does not read x itself."""
        return any(record.input is not None for record in self.records)

    @property
    def adds_to_mapped(self) -> bool:
        """Return True if a record maps the input and also adds to the weight: the added part reads the mapped input,
        not x.
        """
        return any(record.input is not None and record.adds for record in self.records)

    @property
    def goes_by_rows(self) -> bool:
        """Return True if rows have their own records or masks: `ops.grouped_low_rank` computes the low-rank part."""
        return self.runs is not None or bool(self.masks)

    @property
    def is_lowrank(self) -> bool:
        """Return True if there is a low-rank part."""
        return any(record.rank for record in self.records)

    @property
    def has_changes(self) -> bool:
        """Return True if a record changes the weight other than by a low-rank pair."""
        return any(record.changes for record in self.records)

    def mask_of(self, record: int) -> Mask | None:
        """Return the dropout mask of one of the records, if there is any."""
        return self.masks[record] if self.masks else None

    def is_batch(self, n_rows: int) -> bool:
        """Return True if ``n_rows`` rows are enough to apply a term by a kernel or as a matrix."""
        return n_rows >= MANY_ROWS and not self.rows_alone

    def runs_of(self, n_rows: int) -> AdapterRuns:
        """Return the runs of ``n_rows`` rows (for example tokens), each with the index of its record."""
        if self.runs is None:
            return AdapterRuns((Run(0, 0, n_rows),) if self.records else (), n_rows)
        return self.runs.times(n_rows // self.runs.n_rows)

    def spans(self, n_rows: int) -> Iterator[tuple[int, slice]]:
        """Iterate over the runs: the index of the record and the rows that it acts on."""
        return ((k, slice(start, stop)) for k, start, stop in self.runs_of(n_rows).runs)


def tensors_of(layers: Iterable[LinearLayer]) -> tuple[Tensor, ...]:
    """Return all tensors that receive gradients: the `tensors` of each record of each layer."""
    return tuple(tensor for layer in layers for record in layer.records for tensor in record.tensors)


def require_fit(x: Tensor, layers: Sequence[LinearLayer]) -> None:
    """Raise ShapeError if layers do not fit x or their records."""
    problems = [problem for index, layer in enumerate(layers) for problem in _problems(index, layer, x)]
    if problems or not layers:
        raise ShapeError(f"x has {x.shape[-1]} features: " + ("; ".join(problems) or "no layer was given"))


def _problems(index: int, layer: LinearLayer, x: Tensor) -> list[str]:
    o, i = layer.weight.shape
    found = [] if i == x.shape[-1] else [f"weight {index} is {(o, i)}"]
    if layer.runs is None and len(layer.records) > 1:
        found.append(f"layer {index} has {len(layer.records)} records and no runs of rows that take them")
    for record in layer.records:
        found += [
            f"{what} of layer {index} is {own}: {fit} would fit"
            for what, own, fit in _sizes(record, o, i)
            if own != fit
        ]
    if layer.runs is not None and (layer.runs.n_rows == 0 or x.shape[:-1].numel() % layer.runs.n_rows):
        found.append(f"the runs of layer {index} are of {layer.runs.n_rows} rows, and x has {x.shape[:-1].numel()}")
    return found


def _sizes(record: LinearDelta, o: int, i: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield for each part of a record: its name, its shape, and the shape that it must have to fit a layer (o, i)."""
    pair = record.low_rank
    if pair is not None:
        expected = {"a": (pair.rank, i), "b": (o, pair.rank), "core": (pair.rank,), "b_scale": (o,)}
        for name, shape in expected.items():
            value: Tensor | None = getattr(pair, name)
            if value is not None:
                yield name, tuple(value.shape), shape
    for change in record.changes:
        yield "a change", change.shape, (o, i)
    for side, term, width in (("input", record.input, i), ("output", record.output, o)):
        if term is not None:
            yield f"the {'scale' if isinstance(term, Scale) else 'rotation'} of the {side}s", (term.width,), (width,)
    if record.bias is not None:
        yield "bias", tuple(record.bias.shape), (o,)
