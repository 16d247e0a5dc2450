"""The op of every kind of record, and of rows of several, against the record's formula applied row by row."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from flat_records import FIELDS, flat_record, with_tensors
from gradients import has_exact_gradients
from veneer.ops.dropout import Mask, dropout
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.ops.linear import op
from veneer.ops.linear.layer import LinearLayer, tensors_of
from veneer.quant import int8, nf4
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear, entered
from veneer.records.terms.change import Change, Weighed
from veneer.records.terms.rotation import BlockRotation

OUT, IN, LENGTH = 23, 29, 7
KINDS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "pair": ("a", "b"),
    "core": ("a", "b", "core", "b_scale"),
    "in": ("in_scale",),
    "out": ("out_scale", "bias"),
    "out alone": ("out_scale",),
    "bias": ("bias",),
    "pair and bias": ("a", "b", "bias"),
    "pair and out": ("a", "b", "out_scale"),
    "all": FIELDS,
    "change": (),
    "turned": (),
    "turned behind": ("bias",),
    "pair, change, turned": ("a", "b"),
    "change and out": ("a", "b", "core", "in_scale", "out_scale"),
}
ADAPTER_OF_ROW = (1, 1, 0, None, 2, 0, 3)
RUNS = AdapterRuns((Run(1, 0, 2), Run(0, 2, 3), Run(2, 4, 5), Run(0, 5, 6), Run(3, 6, 7)), 7)
MIXES = [
    ("pair", "all", "in", "out"),
    ("bias", "nothing", "core", "pair and out"),
    ("in", "out alone", "out", "bias"),
    ("change", "pair", "turned behind", "nothing"),
    ("pair, change, turned", "all", "change and out", "turned"),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Made(Change):
    """A change that is made for each product, of numbers at places."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return OUT, IN

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values if dtype is None else self.values.to(dtype)
        places = torch.arange(len(values)) * 37 % (OUT * IN)
        return torch.zeros(OUT * IN, dtype=values.dtype).index_put((places,), values).view(OUT, IN).sin()


def record_of(kind: str, seed: int, dtype: torch.dtype) -> LinearDelta:
    generator = torch.Generator().manual_seed(seed)
    r = 3 + seed % 4
    shapes = {"a": (r, IN), "b": (OUT, r), "core": (r,), "in_scale": (IN,)}
    shapes |= dict.fromkeys(("b_scale", "out_scale", "bias"), (OUT,))
    drawn = {field: 0.6 * torch.randn(shapes[field], generator=generator) + 0.1 for field in FIELDS}
    fields = {field: drawn[field].to(dtype).requires_grad_() for field in KINDS[kind]}
    record = flat_record(scale=0.7 + seed / 10, **fields)

    def trained(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, generator=generator) + 0.1).to(dtype).requires_grad_()

    if "change" in kind:
        changes = Made(values=trained(31)), Weighed(of=Made(values=trained(5)), weight=0.7)
        record = dataclasses.replace(record, adds=(*record.adds, *changes))
    if "turned" in kind:
        record = dataclasses.replace(record, input=BlockRotation(trained(1, IN, IN)))
    if "turned behind" in kind:
        record = dataclasses.replace(record, output=BlockRotation(trained(1, OUT, OUT)))
    return record


def drawn(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def masks_of(n_records: int) -> tuple[Mask | None, ...]:
    ids = torch.arange(len(ADAPTER_OF_ROW) * LENGTH) * 3 + 1
    return tuple(Mask(0.3, 11 + k, ids) if k != 1 else None for k in range(n_records))


def by_formula(x: Tensor, layer: LinearLayer) -> Tensor:
    """Row by row; x (rows, LENGTH, IN)."""
    whole = AdapterRuns((Run(0, 0, len(x)),) if layer.records else (), len(x))
    owners = (layer.runs or whole).row_to_adapter(x.device).tolist()
    weight = layer.weight if not isinstance(layer.weight, Tensor) else DenseWeight(layer.weight)
    rows = []
    for n, k in enumerate(owners):
        record = LinearDelta() if k < 0 else layer.records[k]
        mask = layer.masks[k] if layer.masks and k >= 0 else None
        own = None
        if mask is not None and record.adds:
            ids = mask.ids.view(len(x), LENGTH)[n]
            own = dropout(entered(record, x[n]), dataclasses.replace(mask, ids=ids))
        rows.append(apply_linear(record, x[n], weight, layer.bias, own))
    return torch.stack(rows)


def results(function, x: Tensor, layers: list[LinearLayer], dys: list[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    leaves = [x, *(t for t in tensors_of(layers) if t is not None)]
    ys = function(x, layers)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def formulas(x: Tensor, layers: list[LinearLayer]) -> list[Tensor]:
    return [by_formula(x, layer) for layer in layers]


def cast(layer: LinearLayer, dtype: torch.dtype, record_dtype: torch.dtype) -> LinearLayer:
    def fields(record: LinearDelta) -> LinearDelta:
        return with_tensors(record, [t.detach().to(record_dtype).requires_grad_() for t in record.tensors])

    bias = None if layer.bias is None else layer.bias.to(dtype)
    return dataclasses.replace(
        layer, weight=layer.weight.to(dtype), bias=bias, records=tuple(fields(r) for r in layer.records)
    )


def layers_of(names: tuple[str, ...], *, has_bias: bool, masked: bool, by_rows: bool) -> list[LinearLayer]:
    """Two layers that share their input, their records in another order, and a third without any."""
    found = []
    for place in range(2):
        kinds = names if by_rows else (names[place % len(names)],)
        kinds = kinds[place:] + kinds[:place]
        records = tuple(record_of(kind, 5 * place + k, torch.float64) for k, kind in enumerate(kinds))
        found.append(
            LinearLayer(
                weight=drawn(OUT, IN, seed=place) / 3,
                bias=drawn(OUT, seed=7 + place) if has_bias else None,
                records=records,
                runs=RUNS if by_rows else None,
                masks=masks_of(len(records)) if masked else (),
            )
        )
    return [*found, LinearLayer(weight=drawn(OUT, IN, seed=9), bias=drawn(OUT, seed=10) if has_bias else None)]


@pytest.mark.looped("masked", [False, True])
@pytest.mark.looped("has_bias", [True, False])
@pytest.mark.looped("names", [*itertools.pairwise([*KINDS, "pair"])])
def test_each_kind_on_all_rows(names: tuple[str, str], has_bias: bool, masked: bool) -> None:
    layers = layers_of(names, has_bias=has_bias, masked=masked, by_rows=False)
    x, dys = drawn(5, LENGTH, IN), [drawn(5, LENGTH, OUT, seed=20 + i) for i in range(3)]
    if masked:
        ids = torch.arange(5 * LENGTH) * 3 + 1
        layers = [
            dataclasses.replace(y, masks=tuple(m and dataclasses.replace(m, ids=ids) for m in y.masks)) for y in layers
        ]
    for got, expected in zip(results(op.linears, x, layers, dys), results(formulas, x, layers, dys), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("names", MIXES, ids=str)
def test_rows_of_several_records(names: tuple[str, ...], has_bias: bool, masked: bool) -> None:
    """In float32, since the grouped kernels sum in it."""
    layers = layers_of(names, has_bias=has_bias, masked=masked, by_rows=True)
    x, dys = drawn(7, LENGTH, IN), [drawn(7, LENGTH, OUT, seed=20 + i) for i in range(3)]
    for got, expected in zip(results(op.linears, x, layers, dys), results(formulas, x, layers, dys), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names", [*MIXES, ("all",), ("pair and out",), ("core",), ("out",), ("change",), ("turned behind",)], ids=str
)
def test_errs_no_more_than_twice_plain_torch(names: tuple[str, ...], dtype: torch.dtype) -> None:
    by_rows, masked = len(names) > 1, len(names) > 1
    exact = layers_of(names, has_bias=True, masked=masked, by_rows=by_rows)
    x, dys = drawn(7, LENGTH, IN, dtype=dtype), [drawn(7, LENGTH, OUT, seed=20 + i, dtype=dtype) for i in range(3)]
    exact = [cast(cast(layer, dtype, dtype), torch.float64, torch.float64) for layer in exact]
    truth = results(formulas, x.double(), exact, [dy.double() for dy in dys])
    plain = results(formulas, x, [cast(layer, dtype, dtype) for layer in exact], dys)
    ours = results(op.linears, x, [cast(layer, dtype, torch.float32) for layer in exact], dys)
    for got, torchs, true in zip(ours, plain, truth, strict=True):
        error = (got.double() - true).norm()
        assert error <= 2 * (torchs.double() - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("store", [nf4.quantize, int8.quantize], ids=["nf4", "int8"])
def test_on_a_coded_weight(store) -> None:
    weight = store(drawn(64, 64).float())
    shapes = {"a": (5, 64), "b": (64, 5), "in_scale": (64,), "out_scale": (64,), "bias": (64,)}
    fields = {field: drawn(*shape, seed=i).requires_grad_() for i, (field, shape) in enumerate(shapes.items())}
    layers = [LinearLayer(weight=weight, records=(flat_record(scale=1.3, **fields),))]
    x, dy = drawn(3, LENGTH, 64), drawn(3, LENGTH, 64, seed=6)
    expected = results(formulas, x, layers, [dy])
    for got, wanted in zip(results(op.linears, x, layers, [dy]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["all", "pair, change, turned", "turned behind"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_gradients_are_those_of_the_forward_pass(masked: bool, kind: str) -> None:
    layer = layers_of((kind,), has_bias=True, masked=masked, by_rows=False)[0]
    x = drawn(3, IN).requires_grad_()
    if masked:
        layer = dataclasses.replace(layer, masks=(Mask(0.3, 5, torch.tensor([4, 9, 2])),))

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        record = with_tensors(layer.record, tensors)
        return op.linear(x, dataclasses.replace(layer, records=(record,)))

    assert has_exact_gradients(forward, (x, *layer.record.tensors))


def test_a_frozen_pair_gets_no_gradient() -> None:
    record = record_of("core", 3, torch.float64)
    pair = record.low_rank
    pair = dataclasses.replace(pair, a=pair.a.detach(), b=pair.b.detach())
    record = dataclasses.replace(record, adds=(pair,))
    layer = LinearLayer(weight=drawn(OUT, IN), records=(record,))
    x = drawn(2, LENGTH, IN).requires_grad_()
    y = op.linear(x, layer)
    got = torch.autograd.grad(y.square().sum(), (x, pair.core, pair.b_scale))
    expected = torch.autograd.grad(by_formula(x, layer).square().sum(), (x, pair.core, pair.b_scale))
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def test_a_scale_in_float32_is_not_rounded_to_bfloat16() -> None:
    """1.005 is 1.0078 in bfloat16."""
    x = torch.full((2, 4, 8), 64.0, dtype=torch.bfloat16)
    layer = LinearLayer(
        weight=torch.eye(8, dtype=torch.bfloat16), records=(flat_record(out_scale=torch.full((8,), 1.005)),)
    )
    assert torch.equal(op.linear(x, layer), torch.full_like(x, 64 * 1.005))
    assert 64 * float(torch.tensor(1.005).bfloat16()) != (64 * 1.005)


def test_a_bias_in_float32_beside_a_16_bit_one() -> None:
    bias, trained = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 2.5)
    layer = LinearLayer(
        weight=torch.eye(3, dtype=torch.bfloat16), bias=bias,
        records=(flat_record(bias=trained),), runs=AdapterRuns((Run(0, 1, 2),), 2),
    )  # fmt: skip
    mixed = op.linear(torch.zeros(2, 3, dtype=torch.bfloat16), layer)
    assert mixed.dtype == torch.bfloat16
    assert mixed[:, 0].tolist() == [1.0, 2.5]


@torch.no_grad()
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("names", [("in", "all", "pair", "nothing"), ("turned", "change", "in", "turned behind")])
def test_an_x_that_may_be_written_over_changes_no_result(names: tuple[str, ...], n_layers: int, by_rows: bool) -> None:
    layers = layers_of(names, has_bias=True, masked=False, by_rows=by_rows)[:n_layers]
    x = drawn(len(ADAPTER_OF_ROW) * LENGTH, IN)
    dys = [drawn(len(x), OUT, seed=5 + place) for place in range(n_layers)]
    ys, kept = op.forward(x, layers)
    found = op.backward(dys, x, kept, layers)
    own_ys, own_kept = op.forward(x.clone(), layers, owns_x=True)
    own = op.backward(dys, x.clone(), own_kept, layers, owns_x=True)
    torch.testing.assert_close([*own_ys, own.x], [*ys, found.x], rtol=0, atol=0)
    for one, other in zip(own.records, found.records, strict=True):
        assert one is other is None or torch.equal(one, other)
