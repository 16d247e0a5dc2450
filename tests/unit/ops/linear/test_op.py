"""Layers with a low-rank pair: autograd through the record's formula in float64, errors at most twice plain torch's."""

import pytest
import torch

from flat_records import flat_record
from veneer.errors import ShapeError
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.linear import op
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linear, linears
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear
from veneer.records.terms.rotation import BlockRotation


def of(**fields):
    return LinearLayer(weight=torch.zeros(7, 5), records=(flat_record(**fields),))


def turned(rotation):
    return LinearLayer(weight=torch.zeros(7, 5), records=(LinearDelta(input=rotation),))


DTYPES = [torch.float32, torch.bfloat16]
OUTS, RANKS, SCALES = (31, 17, 23), (5, 0, 3), (1.7, 1.0, 0.3)  # the middle layer has no adapter


def draw(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 11, 29, generator=generator).to(dtype)
    layers = [
        tuple(torch.randn(s, generator=generator) * 0.4 for s in ((o, 29), (o,), (r, 29), (o, r)))
        for o, r in zip(OUTS, RANKS, strict=True)
    ]
    dys = [torch.randn(2, 11, o, generator=generator).to(dtype) for o in OUTS]
    return x, [(w.to(dtype), bias.to(dtype), a, b) for w, bias, a, b in layers], dys


def gradients(forward, x, layers, dys, dtype, adapter_dtype):
    x = x.to(dtype).requires_grad_()
    frozen = [(w.to(dtype), bias.to(dtype)) for w, bias, _, _ in layers]
    pairs = [[t.detach().to(adapter_dtype).requires_grad_() for t in (a, b)] for _, _, a, b in layers]
    ys = forward(x, frozen, pairs)
    leaves = [x, *pairs[0], *pairs[2]]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, [d.to(dtype) for d in dys])]


def fused(wrap):
    def forward(x, frozen, pairs):
        return linears(
            x,
            [
                LinearLayer(weight=wrap(w), bias=bias, records=(flat_record(scale=s, a=a, b=b),) if r else ())
                for (w, bias), (a, b), s, r in zip(frozen, pairs, SCALES, RANKS, strict=True)
            ],
        )

    return forward


def by_record(x, frozen, pairs):
    return [
        apply_linear(flat_record(scale=s, **({"a": a, "b": b} if r else {})), x, DenseWeight(w), bias)
        for (w, bias), (a, b), s, r in zip(frozen, pairs, SCALES, RANKS, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [lambda w: w, DenseWeight], ids=["tensor", "object"])
def test_layers_that_share_their_input(wrap, dtype):
    x, layers, dys = draw(dtype)
    ours = gradients(fused(wrap), x, layers, dys, dtype, torch.float32)
    plain = gradients(by_record, x, layers, dys, dtype, dtype)
    exact = gradients(by_record, x, layers, dys, torch.float64, torch.float64)
    for index, (got, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        allowed = 2 * (theirs.double() - truth).abs().max() + 2e-6 * truth.abs().max()
        assert got.dtype == (dtype if index < 4 else torch.float32)
        assert (got.double() - truth).abs().max() <= allowed, index


def test_float64_gradcheck_of_one_layer():
    x, layers, _ = draw(torch.float64)
    w, bias, a, b = (t.double() for t in layers[0])
    leaves = [t.detach().requires_grad_() for t in (x[0, :3].double(), a, b)]
    assert torch.autograd.gradcheck(
        lambda x, a, b: linear(x, LinearLayer(weight=w, bias=bias, records=(flat_record(a=a, b=b, scale=1.7),))), leaves
    )


def test_an_input_is_widened_once_and_only_if_a_product_reads_it(monkeypatch):
    widened = []
    monkeypatch.setattr(op, "operand", lambda x: widened.append(x) or x)
    x, pair = torch.ones(3, 6), flat_record(a=torch.ones(2, 6), b=torch.ones(7, 2), scale=1.0)
    rotation = LinearDelta(input=BlockRotation(torch.ones(2, 3, 3)))
    layers = [LinearLayer(weight=torch.ones(7, 6), records=(record,)) for record in (pair, pair, rotation)]
    op.forward(x, layers)
    assert [own is x for own in widened] == [True, False]
    widened.clear()
    op.forward(x, layers[2:])
    assert [own is x for own in widened] == [False]


def test_input_without_gradient():
    x, layers, dys = draw(torch.float32)
    w, bias, a, b = layers[0]
    a.requires_grad_()
    linear(x, LinearLayer(weight=w, bias=bias, records=(flat_record(a=a, b=b, scale=1.7),))).backward(dys[0])
    assert torch.allclose(a.grad, 1.7 * (dys[0] @ b).flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("own_checks")
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda: [], "no layer was given"),
        (lambda: [LinearLayer(weight=torch.zeros(7, 6))], "weight 0 is (7, 6)"),
        (lambda: [of(a=torch.zeros(2, 5), b=torch.zeros(2, 7))], "b of layer 0 is (2, 7): (7, 2) would fit"),
        (lambda: [of(a=torch.zeros(2, 5), b=torch.zeros(7, 2), core=torch.zeros(3))], "core of layer 0 is (3,)"),
        (
            lambda: [turned(BlockRotation(torch.zeros(2, 3, 3)))],
            "the rotation of the inputs of layer 0 is (6,): (5,) would fit",
        ),
        (lambda: [of(out_scale=torch.zeros(5))], "the scale of the outputs of layer 0 is (5,): (7,) would fit"),
        (lambda: [of(in_scale=torch.zeros(7))], "the scale of the inputs of layer 0 is (7,)"),
        (
            lambda: [LinearLayer(weight=torch.zeros(7, 5), records=(LinearDelta(),) * 2)],
            "layer 0 has 2 records and no runs",
        ),
        (lambda: [LinearLayer(weight=torch.zeros(7, 5), runs=AdapterRuns((), 2))], "the runs of layer 0 are of 2 rows"),
    ],
)
def test_layer_that_does_not_fit(layers, words):
    with pytest.raises(ShapeError, match="x has 5 features") as caught:
        linears(torch.zeros(3, 5), layers())
    assert words in str(caught.value)
