"""Mixed batches: what they refuse. That their rows are right is a law of tests/contract."""

import pytest
import torch

from veneer.core.linear import apply_linear
from veneer.core.records import LinearDelta
from veneer.core.rows import apply_linear_rows
from veneer.errors import ShapeError
from veneer.quant.dense import DenseWeight

WEIGHT = DenseWeight(torch.arange(15.0).reshape(3, 5) / 7)


def test_dropout_touches_only_what_feeds_a():
    x, delta = torch.ones(2, 5), LinearDelta(a=torch.ones(1, 5), b=torch.ones(3, 1), in_scale=torch.full((5,), 0.5))
    dropped = x * torch.tensor([0.0, 2.0, 0.0, 2.0, 2.0])
    mixed = apply_linear_rows([delta, LinearDelta()], torch.tensor([0, 1]), x, WEIGHT, lowrank_input=dropped)
    assert torch.equal(mixed[0], apply_linear(delta, x[0], WEIGHT, lowrank_input=dropped[0]))
    assert torch.equal(mixed[1], WEIGHT.matmul(x[1]))


def test_a_bias_in_float32_beside_a_16_bit_one():
    weight = DenseWeight(torch.eye(3, dtype=torch.bfloat16))
    bias, trained = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 2.5)
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    mixed = apply_linear_rows([LinearDelta(), LinearDelta(bias=trained)], torch.tensor([1, 0]), x, weight, bias)
    assert mixed.dtype == torch.bfloat16
    assert mixed[:, 0].tolist() == [2.5, 1.0]


@pytest.mark.parametrize(
    ("row_index", "words"),
    [
        (torch.tensor([0]), "row_index has shape (1,) beside an x of shape (2, 5)"),
        (torch.tensor([0, 2]), "row_index holds [0, 2]; there are records 0 to 1"),
        (torch.tensor([-1, 0]), "row_index holds [-1, 0]"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(row_index, words):
    with pytest.raises(ShapeError) as caught:
        apply_linear_rows([LinearDelta(), LinearDelta()], row_index, torch.ones(2, 5), WEIGHT)
    assert words in str(caught.value)
