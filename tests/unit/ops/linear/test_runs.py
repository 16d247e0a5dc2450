"""Runs of rows with low-rank pairs of their own: the record's formula row by row, in float64, under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flat_records import flat_record
from veneer.core.linear import apply_linear
from veneer.core.records import LinearDelta
from veneer.ops.grouped_low_rank import AdapterRuns, Run
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linears
from veneer.quant.dense import DenseWeight

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
