"""Applying, folding and composing linear records, against closed forms."""

from dataclasses import replace

import pytest
import torch

from flat_records import flat_record
from veneer.errors import CompositionError
from veneer.quant.dense import DenseWeight
from veneer.records import linear
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import (
    apply_embedding,
    apply_linear,
    apply_linear_sum,
    compose_linear,
    fold_linear,
)
from veneer.records.terms.scale import Scale

OUT, IN = 7, 5
generator = torch.Generator().manual_seed(17)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W, C, X = normal(OUT, IN), normal(OUT), normal(3, IN)


def low_rank(rank: int, scale: float) -> LinearDelta:
    return flat_record(a=normal(rank, IN), b=normal(OUT, rank), scale=scale)


def scales() -> LinearDelta:
    """As IA3 makes it on outputs: the bias scaled too."""
    vector = normal(OUT)
    return flat_record(out_scale=vector, bias=C * vector)


def apply(delta: LinearDelta, bias: torch.Tensor | None = C) -> torch.Tensor:
    return apply_linear(delta, X, DenseWeight(W), bias)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_dense_weight_is_a_frozen_weight():
    assert isinstance(DenseWeight(W), FrozenWeight)


def test_a_dense_weight_answers_in_its_own_dtype_unless_autocast_says_otherwise():
    weight = DenseWeight(torch.ones(3, 2))
    assert weight.matmul(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert weight.matmul_t(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert weight.matmul(torch.ones(1, 2)).dtype == torch.bfloat16


def test_the_formula_of_the_record():
    d = flat_record(
        a=normal(2, IN), b=normal(OUT, 2), scale=0.7, in_scale=normal(IN), out_scale=normal(OUT), bias=normal(OUT)
    )
    u, pair = d.input_scale * X, d.low_rank
    close(apply(d), d.output_scale * (u @ W.T + 0.7 * u @ (pair.b @ pair.a).T) + d.bias)


def test_an_empty_record_is_the_base_layer():
    close(apply(LinearDelta()), X @ W.T + C)
    close(apply(LinearDelta(), bias=None), X @ W.T)


def test_what_stands_in_front_of_a_does_not_reach_the_frozen_weight():
    d, dropped = low_rank(2, 0.7), X * torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0])
    close(apply_linear(d, X, DenseWeight(W), C, dropped), X @ W.T + dropped @ d.added().T + C)


def test_trained_scales_are_not_rounded_to_16_bits():
    """1.005 lies between two neighbours in bfloat16, 1 and 1.0078: rounded to either, it would act as that."""
    x = torch.linspace(1, 2, 4096).bfloat16()[:, None]
    out = flat_record(out_scale=torch.tensor([1.005]))
    into = flat_record(in_scale=torch.tensor([1.005]))
    for delta in (out, into):
        y = apply_linear(delta, x, DenseWeight(torch.ones(1, 1, dtype=torch.bfloat16)))
        assert y.dtype == torch.bfloat16
        ratio = (y.double() / x.double()).mean().item()
        assert ratio == pytest.approx(1.005, abs=6e-4)


def test_what_is_added_is_rounded_once_with_the_base():
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    delta = flat_record(a=torch.ones(1, 1), b=torch.full((1, 1), 2**-9), bias=torch.tensor([2**-9]))
    # 2**-8 is half of the spacing above 1: each part alone would vanish, twice; ties go to even, so add a little
    y = apply_linear(delta, one, DenseWeight(one), torch.tensor([0.0]))
    assert y.item() == 1.0
    more = flat_record(a=delta.low_rank.a, b=delta.low_rank.b, bias=torch.tensor([2**-9 + 2**-12]))
    assert apply_linear(more, one, DenseWeight(one)).item() == 1.0 + 2**-7


def test_folding_computes_wider_than_it_stores():
    w16 = W.bfloat16()
    delta = flat_record(a=normal(2, IN).float(), b=normal(OUT, 2).float(), scale=0.7)
    folded, bias = fold_linear(delta, w16, C.bfloat16())
    assert folded.dtype == torch.bfloat16
    exact = w16.double() + 0.7 * delta.low_rank.b.double() @ delta.low_rank.a.double()
    assert torch.equal(folded, exact.float().bfloat16())
    assert torch.equal(bias, C.bfloat16())


@pytest.mark.parametrize("n_values", [1, 23, 10**6])
def test_folding_outside_of_autograd_goes_block_by_block(monkeypatch, n_values):
    """The rows of a matrix, the experts of a stack: the same result as all at once."""
    factors = low_rank(2, 1.7)
    of_rows = replace(factors, input=Scale(normal(IN)), output=Scale(normal(OUT)))
    of_experts = flat_record(a=normal(3, 2, IN), b=normal(3, OUT, 2), scale=0.3)
    for delta, weight in ((of_rows, W), (of_rows, W.T.contiguous().T), (of_experts, torch.stack([W, 3 * W, W - 2]))):
        whole, _ = fold_linear(delta, weight)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(linear, "BLOCK_VALUES", n_values)
            close(fold_linear(delta, weight)[0], whole)
            narrow, bias = fold_linear(delta, weight, C, torch.bfloat16)
        assert narrow.dtype == bias.dtype == torch.bfloat16
        assert torch.equal(narrow, whole.bfloat16())


def test_folding_gives_a_bias_where_there_was_none():
    folded, bias = fold_linear(flat_record(bias=C), W)
    close(folded, W)
    close(bias, C)


def test_composed_low_rank_parts_are_their_sum():
    parts = [low_rank(2, 0.7), low_rank(3, -1.3), flat_record(a=normal(1, IN), b=normal(OUT, 1), bias=normal(OUT))]
    pairs = [part.low_rank for part in parts]
    expected = X @ W.T + sum(p.scale * X @ (p.b @ p.a).T for p in pairs) + parts[2].bias
    whole = compose_linear(parts, C)
    assert whole.rank == 6
    close(apply(whole), expected)


def test_composed_biases_add_their_changes():
    parts = [flat_record(bias=C + 0.3), flat_record(bias=C - 1.1), low_rank(2, 0.5)]
    close(compose_linear(parts, C).bias, C - 0.8)
    close(compose_linear([flat_record(bias=C), flat_record(bias=2 * C)], None).bias, 3 * C)


def test_composed_scales_are_one_after_the_other():
    first, second, third = scales(), scales(), flat_record(in_scale=normal(IN))
    expected = second.output_scale * (first.output_scale * ((third.input_scale * X) @ W.T + C))
    close(apply(compose_linear([first, second, third], C)), expected)


def test_one_record_composes_to_itself_and_none_to_the_base():
    delta = scales()
    assert compose_linear([delta]) is delta
    close(apply(compose_linear([], C)), X @ W.T + C)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([scales(), low_rank(2, 0.5)], id="IA3 and LoRA"),
        pytest.param(
            [low_rank(2, 0.5), flat_record(a=normal(1, IN), b=normal(OUT, 1), out_scale=normal(OUT))], id="DoRA"
        ),
        pytest.param([flat_record(in_scale=normal(IN)), flat_record(bias=normal(OUT))], id="IA3 and a trained bias"),
    ],
)
def test_a_scale_beside_a_sum_cannot_be_composed(parts):
    with pytest.raises(CompositionError, match="2 adapters are active on one layer and 1 of them scale"):
        compose_linear(parts, C)


def test_a_sum_is_what_its_records_compose_to_with_inputs_of_their_own():
    parts = [low_rank(2, 0.7), low_rank(3, -1.3), flat_record(bias=C + 0.3)]
    whole = DenseWeight(W)
    close(apply_linear_sum(parts, X, whole, C, [None] * 3), apply_linear(compose_linear(parts, C), X, whole, C))
    mine = [X * 2, X - 1.0, None]
    expected = (
        X @ W.T
        + 0.7 * mine[0] @ (parts[0].low_rank.b @ parts[0].low_rank.a).T
        - 1.3 * mine[1] @ (parts[1].low_rank.b @ parts[1].low_rank.a).T
    )
    close(apply_linear_sum(parts, X, whole, C, mine), expected + C + 0.3)
    with pytest.raises(CompositionError):
        apply_linear_sum([parts[0], scales()], X, whole, C, [None, None])


def test_a_sum_is_rounded_once():
    """Each part is half of bfloat16's spacing above 1: added one by one they would vanish."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    part = flat_record(a=torch.ones(1, 1), b=torch.full((1, 1), 2**-8))
    assert apply_linear_sum([part, part], one, DenseWeight(one), None, [None, None]).item() == 1.0 + 2**-7


def test_an_embedding_is_the_linear_layer_on_one_hot_rows():
    delta = flat_record(
        a=normal(2, IN), b=normal(OUT, 2), scale=0.7, in_scale=normal(IN), out_scale=normal(OUT), bias=normal(OUT)
    )
    ids = torch.tensor([[4, 0], [2, 2]])
    one_hot = torch.nn.functional.one_hot(ids, IN).double()
    close(apply_embedding(delta, ids, W.T[ids]), apply_linear(delta, one_hot, DenseWeight(W)))
