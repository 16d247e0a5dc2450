"""Runs of rows with low-rank pairs of their own: the record's formula row by row, in float64, under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flat_records import flat_record
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import _together, linears
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear
from veneer.records.terms.rotation import BlockRotation

OUTS = (31, 17, 23)
RANKS = ((5, 0, 3), (0, 0, 0), (2, 7, 0))  # of three adapters on each layer; the middle layer has none
SCALES = (1.7, 0.3, 2.1)
ADAPTER_OF_ROW = (1, 1, 0, None, 2, 0)  # adapter 0 has two runs, one row has no adapter
RUNS = AdapterRuns((Run(1, 0, 2), Run(0, 2, 3), Run(2, 4, 5), Run(0, 5, 6)), len(ADAPTER_OF_ROW))
LENGTH = 7


def draw(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[list[list[Tensor]]], list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(ADAPTER_OF_ROW), LENGTH, 29, generator=generator)
    weights = [torch.randn(o, 29, generator=generator) * 0.4 for o in OUTS]
    pairs = [
        [[torch.randn(s, generator=generator) * 0.4 for s in ((r, 29), (o, r))] for r in ranks]
        for o, ranks in zip(OUTS, RANKS, strict=True)
    ]
    dys = [torch.randn(len(ADAPTER_OF_ROW), LENGTH, o, generator=generator).to(dtype) for o in OUTS]
    return x.to(dtype), [w.to(dtype) for w in weights], pairs, dys


def layer_of(weight: Tensor, pairs: list[list[Tensor]], ranks: tuple[int, ...]) -> LinearLayer:
    records = tuple(
        flat_record(a=a, b=b, scale=scale) if r else LinearDelta()
        for (a, b), r, scale in zip(pairs, ranks, SCALES, strict=True)
    )
    return LinearLayer(weight=weight, records=records, runs=RUNS)


def together(x: Tensor, weights: list[Tensor], pairs: list[list[list[Tensor]]]) -> list[Tensor]:
    layers = [layer_of(w, p, r) for w, p, r in zip(weights, pairs, RANKS, strict=True)]
    return list(linears(x, layers))


def row_by_row(x: Tensor, weights: list[Tensor], pairs: list[list[list[Tensor]]]) -> list[Tensor]:
    def delta(layer: int, k: int | None) -> LinearDelta:
        if k is None or not RANKS[layer][k]:
            return LinearDelta()
        a, b = pairs[layer][k]
        return flat_record(a=a, b=b, scale=SCALES[k])

    return [
        torch.stack([apply_linear(delta(i, k), row, DenseWeight(w)) for row, k in zip(x, ADAPTER_OF_ROW, strict=True)])
        for i, w in enumerate(weights)
    ]


def gradients(forward, inputs, dtype, adapter_dtype):
    x, weights, pairs, dys = inputs
    x, weights = x.to(dtype).requires_grad_(), [w.to(dtype) for w in weights]
    pairs = [[[t.detach().to(adapter_dtype).requires_grad_() for t in pair] for pair in layer] for layer in pairs]
    ys = forward(x, weights, pairs)
    used = [
        t
        for layer, ranks in zip(pairs, RANKS, strict=True)
        for pair, r in zip(layer, ranks, strict=True)
        if r
        for t in pair
    ]
    grads = torch.autograd.grad(ys, [x, *used], [d.to(dtype) for d in dys])
    return [*(y.detach() for y in ys), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_every_row_by_itself(dtype: torch.dtype) -> None:
    inputs = draw(dtype)
    exact = gradients(row_by_row, inputs, torch.float64, torch.float64)
    plain = gradients(row_by_row, inputs, dtype, dtype)
    ours = gradients(together, inputs, dtype, torch.float32)
    for own, torchs, truth in zip(ours, plain, exact, strict=True):
        error = (own.double() - truth).abs().max()
        assert error <= 2 * (torchs.double() - truth).abs().max() + 1e-12


TURNED_RECORD = (0, 1, None, 0)  # of each row: a pair, a rotation (on the second layer with a pair), and nothing


def turned_records(layer: int, tensors: list[Tensor]) -> tuple[LinearDelta, ...]:
    """Of one layer: a pair, and a rotation of inputs. The third layer has no rotation."""
    a, b, blocks, own_a, own_b = tensors
    pair = flat_record(a=a, b=b, scale=1.7)
    adds = flat_record(a=own_a, b=own_b, scale=0.3).adds if layer == 1 else ()
    return pair, LinearDelta() if layer == 2 else LinearDelta(adds=adds, input=BlockRotation(blocks))


def turned_gradients(
    length: int, dtype: torch.dtype, adapter_dtype: torch.dtype, *, by_rows: bool
) -> tuple[list[LinearLayer], list[Tensor]]:
    """Layers, and their outputs and gradients: all rows at once, or by the record's formula row by row."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float() * 0.25  # 16 bits hold it

    x, weights = drawn(4, length, 28).to(dtype).requires_grad_(), [drawn(o, 28).to(dtype) for o in OUTS]
    dys = [drawn(4, length, o).to(dtype) for o in OUTS]
    sizes = [((5, 28), (o, 5), (4, 7, 7), (3, 28), (o, 3)) for o in OUTS]
    tensors = [[drawn(*shape).to(adapter_dtype).requires_grad_() for shape in each] for each in sizes]
    records = [turned_records(layer, each) for layer, each in enumerate(tensors)]
    runs = AdapterRuns((Run(0, 0, 1), Run(1, 1, 2), Run(0, 3, 4)), 4)
    layers = [LinearLayer(weight=w, records=own, runs=runs) for w, own in zip(weights, records, strict=True)]
    if by_rows:
        ys = [
            torch.stack([
                apply_linear(LinearDelta() if k is None else own[k], row, DenseWeight(w))
                for row, k in zip(x, TURNED_RECORD, strict=True)
            ])
            for w, own in zip(weights, records, strict=True)
        ]  # fmt: skip
    else:
        ys = list(linears(x, layers))
    leaves = [t for own in records for record in own for t in record.tensors]
    return layers, [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *leaves], dys)]


@pytest.mark.parametrize("length", [7, 67])  # kernels map the rows of a batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_of_some_rows_beside_pairs_of_others(dtype: torch.dtype, length: int) -> None:
    layers, ours = turned_gradients(length, dtype, torch.float32, by_rows=False)
    assert [layer.adds_to_mapped for layer in layers] == [False, True, False]
    assert _together(layers) == [[0, 2], [1]]  # two layers' pairs read x, in one call
    _, plain = turned_gradients(length, dtype, dtype, by_rows=True)
    _, exact = turned_gradients(length, torch.float64, torch.float64, by_rows=True)
    for own, torchs, truth in zip(ours, plain, exact, strict=True):
        error = (own.double() - truth).abs().max()
        assert error <= 2 * (torchs.double() - truth).abs().max() + 1e-6 * truth.abs().max()
