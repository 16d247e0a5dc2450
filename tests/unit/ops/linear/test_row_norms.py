"""Norms of the rows of a weight with a low-rank update, against the weight itself in float64."""

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.linear.row_norms import row_norms

OP = "row_norms.row_norms"
SHAPES = [(1, 1, 1), (7, 17, 3), (70, 33, 16), (257, 40, 5), (9, 65, 40)]  # outputs, inputs, rank


def draw(o, i, rank):
    generator = torch.Generator().manual_seed(o * i)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((o, i), (rank, i), (o, rank)))
    return w, a, b


@pytest.mark.looped("scale", [0.7, -1.5])
@pytest.mark.looped("wide", [torch.float32, torch.bfloat16])
@pytest.mark.looped(("o", "i", "rank"), SHAPES)
def test_norms_are_those_of_the_sum(o, i, rank, wide, scale, backend):
    w, a, b = draw(o, i, rank)
    wa = torch.nn.functional.linear(a, w).to(wide)
    got = row_norms(w.square().sum(dim=1), wa, a, b, scale, backend=backend)
    exact = (w.double() + scale * b.double() @ a.double()).norm(dim=1)
    assert got.dtype == b.dtype
    torch.testing.assert_close(got.double(), exact, rtol=1e-5 if wide == torch.float32 else 3e-2, atol=1e-3)


def test_a_row_that_the_update_cancels_has_the_least_norm(backend):
    w, _, _ = draw(5, 4, 1)
    a, b = w.clone(), -torch.eye(5)
    b[3, 3] = torch.nan
    got = row_norms(w.square().sum(dim=1), a @ w.T, a, b, 1.0, least=0.01, backend=backend)
    assert torch.equal(got.isnan(), torch.arange(5) == 3)  # a maximum would pass it over
    assert ((got >= 0.01) | got.isnan()).all()
    assert (got.nan_to_num() < 0.1).all()


@pytest.mark.usefixtures("own_checks")
def test_shapes_that_do_not_fit():
    w, a, b = draw(5, 4, 2)
    with pytest.raises(ShapeError, match=r"B is \(5, 2\), so row_sq must be \(5,\)"):
        row_norms(torch.ones(4), a @ w.T, a, b, 1.0)
    with pytest.raises(ShapeError, match=r"wa \(2, 5\)"):
        row_norms(torch.ones(5), w @ a.T, a, b, 1.0)
