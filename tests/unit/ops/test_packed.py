"""Packed weights: round trips to the bit, products against float64, rows that do not depend on their companions."""

from functools import partial

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.packed import PackedWeight

OP = "packed.matmul"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 32, 33]
SHAPES = [(1, 1), (7, 3), (16, 31), (37, 64), (67, 33), (131, 97), (64, 131)]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def require_exact(got, x, dense, onto=None):
    """Within a rounding of the result, and of float32 sums of as many terms as there are inputs."""
    exact = x.double() @ dense.double().T
    terms = x.double().abs() @ dense.double().abs().T
    if onto is not None:
        exact, terms = exact + onto.double(), terms + onto.double().abs()
    allowed = UNIT[got.dtype] * exact.abs() + (x.shape[1] + 2) ** 0.5 * 4 * UNIT[torch.float32] * terms
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", [*SHAPES, (0, 5), (5, 0), (129, 32)])
def test_a_weight_comes_back_to_the_bit(shape, dtype, backend):
    weight = draw(*shape, dtype=dtype)
    packed = PackedWeight.pack(weight, backend=backend)
    assert torch.equal(packed.panels, PackedWeight.pack(weight, backend="reference").panels)
    assert torch.equal(packed.dense(backend=backend), weight)
    assert (packed.shape, packed.dtype) == (shape, dtype)
    assert packed.nbytes == packed.panels.nbytes >= weight.nbytes


def test_a_view_is_packed_as_what_it_shows(backend):
    weight = draw(41, 58)
    for view in (weight[3:, 5:], weight.T, weight[::2]):
        assert torch.equal(PackedWeight.pack(view, backend=backend).dense(backend=backend), view)


@pytest.mark.looped("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", SHAPES)
def test_products_are_exact_to_their_rounding(shape, dtype, x_dtype, backend):
    weight = draw(*shape, dtype=dtype)
    packed = PackedWeight.pack(weight, backend=backend)
    for n in ROWS:
        x = draw(n, shape[1], dtype=x_dtype)
        y = packed.matmul(x, backend=backend)
        assert y.dtype == x_dtype
        require_exact(y, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_five_hundred_rows(dtype, backend):
    weight, x = draw(83, 201, dtype=dtype), draw(512, 201, dtype=torch.bfloat16)
    require_exact(PackedWeight.pack(weight).matmul(x, backend=backend), x, weight)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_added_and_written_where_asked(x_dtype, y_dtype, backend):
    weight, wide = draw(45, 67, dtype=torch.bfloat16), draw(9, 200, dtype=x_dtype)
    x, packed = wide[:, 11:78], PackedWeight.pack(weight)
    onto, rows = draw(9, 45, dtype=y_dtype), torch.full((9, 61), 7.0, dtype=y_dtype)
    fresh = packed.matmul(x, onto=onto, backend=backend)
    assert fresh.dtype == y_dtype
    require_exact(fresh, x, weight, onto)
    place = rows[:, 3:48]
    assert packed.matmul(x, onto=onto, out=place, backend=backend) is place
    assert torch.equal(place, fresh)
    assert (rows[:, :3] == 7).all()
    assert (rows[:, 48:] == 7).all()
    bias = onto[:1].expand(9, -1)
    assert torch.equal(
        packed.matmul(x, onto=bias, backend=backend), packed.matmul(x, onto=bias.clone(), backend=backend)
    )
    place.copy_(onto)
    packed.matmul(x, onto=place, out=place, backend=backend)
    assert torch.equal(place, fresh)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_companions(dtype, x_dtype, backend):
    # torch's own product, which the reference is, may take another order for another number of rows
    in_threads = backend == "cpu"
    same = torch.equal if in_threads else partial(torch.allclose, rtol=0.01, atol=0.001)
    packed = PackedWeight.pack(draw(1203 if in_threads else 43, 301, dtype=dtype))
    x = draw(193, 301, dtype=x_dtype)
    x[5, 17] = float("nan")  # stays in its row
    before = torch.get_num_threads()
    alone = torch.cat([packed.matmul(x[r : r + 1], backend=backend) for r in range(193)])
    try:
        for threads in (1, 2, 3) if in_threads else (before,):
            torch.set_num_threads(threads)
            for n in (*ROWS, 97, 193):  # two pieces, and three of which a thread takes one and a half
                together = packed.matmul(x[:n], backend=backend)
                assert same(together.nan_to_num(3.0), alone[:n].nan_to_num(3.0)), (n, threads)
    finally:
        torch.set_num_threads(before)
    assert alone.isnan().any(1).nonzero().tolist() == [[5]]


def test_no_rows(backend):
    assert PackedWeight.pack(draw(5, 7)).matmul(draw(0, 7), backend=backend).shape == (0, 5)
    assert not PackedWeight.pack(draw(5, 0)).matmul(draw(3, 0), backend=backend).any()


@pytest.mark.usefixtures("own_checks")
def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"matrix of float32 or bfloat16 or float16; given torch\.float64"):
        PackedWeight.pack(torch.zeros(2, 3, dtype=torch.float64))
    packed = PackedWeight.pack(torch.zeros(5, 7))
    x = torch.zeros(2, 7)
    with pytest.raises(ShapeError, match=r"x must be \(n, 7\).*given \(2, 6\)"):
        packed.matmul(x[:, 1:])
    with pytest.raises(ShapeError, match=r"x must be.*float16"):
        packed.matmul(x.half())
    with pytest.raises(ShapeError, match=r"out must be \(2, 5\)"):
        packed.matmul(x, out=torch.zeros(2, 6))
    with pytest.raises(ShapeError, match="last axis contiguous"):
        packed.matmul(x, onto=torch.zeros(5, 2).T)
    with pytest.raises(ShapeError, match="one dtype"):
        packed.matmul(x, onto=torch.zeros(2, 5), out=torch.zeros(2, 5).bfloat16())
