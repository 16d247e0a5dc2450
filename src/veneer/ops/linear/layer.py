"""A frozen linear layer with the records that act on it, as `ops.linear.op` takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from veneer.core.frozen import FrozenWeight
from veneer.core.records import LinearDelta
from veneer.errors import ShapeError
from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import AdapterRuns, Run

Weight = Float[Tensor, "o i"] | FrozenWeight
FIELDS = ("a", "core", "b", "b_scale", "in_scale", "out_scale", "bias")
"""The fields of a record that are tensors."""

NOTHING = LinearDelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """A frozen layer ``W (o, i)`` with its bias, and what adapters make of it.

    Without ``runs`` there is at most one record, which acts on all rows; with them, a row takes the record that its run
    names, or none. A row may be many tokens. ``masks`` are those of dropout in front of each record's A; without any
    nothing is dropped.

    A record's tensors may be wider than x (float32 beside bf16): pairs are rounded to x's dtype for the products, which
    accumulate in float32; scales and biases are not rounded. Gradients come back in the tensors' own dtype.
    """

    weight: Weight
    bias: Float[Tensor, " o"] | None = None
    records: tuple[LinearDelta, ...] = ()
    runs: AdapterRuns | None = None
    masks: tuple[Mask | None, ...] = ()

    @property
    def record(self) -> LinearDelta:
        """The record of all rows."""
        return self.records[0] if self.records else NOTHING

    @property
    def scales_input(self) -> bool:
        """True where a record scales the input, so that the layer does not read x itself."""
        return any(record.in_scale is not None for record in self.records)

    @property
    def goes_by_rows(self) -> bool:
        """True where rows have records or masks of their own: their low-rank part is `ops.grouped_low_rank`."""
        return self.runs is not None or bool(self.masks)

    @property
    def is_lowrank(self) -> bool:
        """True where there is a low-rank part."""
        return any(record.rank for record in self.records)

    def runs_of(self, n_rows: int) -> AdapterRuns:
        """The runs of ``n_rows`` rows, tokens say, by the record that they take."""
        if self.runs is None:
            return AdapterRuns((Run(0, 0, n_rows),) if self.records else (), n_rows)
        return self.runs.times(n_rows // self.runs.n_rows)

    def spans(self, n_rows: int) -> Iterator[tuple[int, slice]]:
        """The place of a record and the rows that it acts on, run by run."""
        return ((k, slice(start, stop)) for k, start, stop in self.runs_of(n_rows).runs)


def tensors_of(layers: Iterable[LinearLayer]) -> tuple[Tensor | None, ...]:
    """All that gradients flow to: of each layer each record's `FIELDS`."""
    return tuple(getattr(record, field) for layer in layers for record in layer.records for field in FIELDS)


def require_fit(x: Tensor, layers: Sequence[LinearLayer]) -> None:
    """Raise ShapeError where layers do not fit x or their records."""
    problems = [problem for index, layer in enumerate(layers) for problem in _problems(index, layer, x)]
    if problems or not layers:
        raise ShapeError(f"x has {x.shape[-1]} features: " + ("; ".join(problems) or "no layer was given"))


def _problems(index: int, layer: LinearLayer, x: Tensor) -> list[str]:
    o, i = layer.weight.shape
    found = [] if i == x.shape[-1] else [f"weight {index} is {(o, i)}"]
    if layer.runs is None and len(layer.records) > 1:
        found.append(f"layer {index} has {len(layer.records)} records and no runs of rows that take them")
    for record in layer.records:
        r = record.rank
        expected = {"a": (r, i), "b": (o, r), "core": (r,), "in_scale": (i,)}
        expected |= dict.fromkeys(("b_scale", "out_scale", "bias"), (o,))
        if (record.a is None) != (record.b is None):
            found.append(f"a record of layer {index} has one of a and b: give both or neither")
            continue
        for field in FIELDS:
            value: Tensor | None = getattr(record, field)
            if value is not None and tuple(value.shape) != expected[field]:
                found.append(f"{field} of layer {index} is {tuple(value.shape)}: {expected[field]} would fit")
    if layer.runs is not None and (layer.runs.n_rows == 0 or x.shape[:-1].numel() % layer.runs.n_rows):
        found.append(f"the runs of layer {index} are of {layer.runs.n_rows} rows, and x has {x.shape[:-1].numel()}")
    return found
