"""Forms of many rows: maps and gradients are those of the matrix, in either direction, whatever the number of rows."""

from dataclasses import replace

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.linear.forms import (
    LEAST_SAVED,
    MATRIX_ROWS,
    MOST_OF_SECOND,
    MOST_PLACES,
    entries,
    entry_gradients,
    form_gradients,
    has_entries,
    has_kernel,
    map_rows,
    shape_of,
)
from veneer.ops.reference.terms import matrix_of
from veneer.quant.dense import DenseWeight
from veneer.records.terms.base import Base
from veneer.records.terms.form import Form

OP = "terms.map_rows"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N_ROWS = [1, 67, 293]  # within a register, beyond a piece, beyond what is turned at once


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def places(o, i, n):
    return torch.randperm(o * i, generator=torch.Generator().manual_seed(o))[:n]


FORMS = {
    "blocks of 32": Form("blocks", (5, 32), drawn(5, 32, 32)),
    "blocks of 7": Form("blocks", (9, 7), drawn(9, 7, 7)),
    "sparse": Form("sparse", (37, 53), drawn(300), places=places(37, 53, 300).sort().values),
    "sparse, in any order": Form("sparse", (37, 53), drawn(300), places=places(37, 53, 300)),
    "sparse, empty rows": Form("sparse", (41, 11), drawn(6), places=places(41, 11, 6)),
    "kronecker": Form("kronecker", (5, 7, 24, 19), drawn(5, 7), drawn(24, 19)),
    "kronecker of ones": Form("kronecker", (1, 1, 3, 17), drawn(1, 1), drawn(3, 17)),
}


@pytest.mark.looped("n", N_ROWS)
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("transposed", [False, True])
@pytest.mark.looped("add", [True, False])
@pytest.mark.looped("name", FORMS)
def test_rows_are_mapped_by_the_matrix(name, add, transposed, dtype, n, backend):
    form = FORMS[name]
    matrix = matrix_of(form).double()
    matrix = matrix.T if transposed else matrix
    x, y = drawn(n, matrix.shape[1]).to(dtype), drawn(n, matrix.shape[0], seed=2).to(dtype)
    expected = x.double() @ matrix.T + (y.double() if add else 0)
    size = x.double().abs() @ matrix.abs().T + y.double().abs()
    map_rows(form, x, y, add=add, transposed=transposed, backend=backend)
    assert ((y.double() - expected).abs() <= 2e-6 * size + torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.looped("n", N_ROWS)
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("name", FORMS)
def test_gradients_are_those_of_the_matrix(name, dtype, n, backend):
    form = FORMS[name]
    o, i = shape_of(form)
    x, dy = drawn(n, i).to(dtype), drawn(n, o, seed=4).to(dtype)
    leaves = [t.double().requires_grad_() for t in (form.values, form.second) if t is not None]
    wide = Form(form.kind, form.sizes, leaves[0], *leaves[1:], places=form.places)
    wanted = torch.autograd.grad(matrix_of(wide), leaves, dy.double().T @ x.double())
    got = [g for g in form_gradients(form, dy, x, backend=backend) if g is not None]
    for own, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=3e-6 * n**0.5 * exact.abs().max().item())


def test_rows_between_other_columns_are_mapped_where_they_lie(backend):
    form, wide = FORMS["blocks of 32"], drawn(65, 171)
    x = wide[:, 5:165]
    expected, beside = x @ matrix_of(form).T, wide[:, 165:].clone()
    map_rows(form, x, x, add=False, backend=backend)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 165:], beside)


def test_rows_of_another_size_or_dtype_are_refused():
    form, x, y = FORMS["kronecker"], torch.ones(2, 133), torch.ones(2, 120)
    for given in ((x[:, :5], y), (x, y[:, :5]), (x.bfloat16(), y)):
        with pytest.raises(ShapeError, match="rows of 133 values to rows of 120 in the same dtype"):
            map_rows(form, *given, add=True)
        with pytest.raises(ShapeError, match=r"dy \(n, 120\) and x \(n, 133\) of one dtype"):
            form_gradients(form, given[1], given[0])


def test_what_is_faster_as_a_matrix_has_no_kernel():
    def asked(form, n=64, dtype=torch.bfloat16, isa="avx512_bf16"):
        return has_kernel(form, torch.ones(n, 1, dtype=dtype), isa)

    small, large = (Form("blocks", (2, b), torch.ones(2, b, b)) for b in (64, 65))
    n = int(MOST_PLACES * 40 * 32)
    few, many = (Form("sparse", (40, 32), torch.ones(k), places=torch.arange(k)) for k in (n, n + 1))
    kronecker = Form("kronecker", (12, 12, 5, 12), torch.ones(12, 12), torch.ones(5, 12))
    assert [asked(form) for form in (small, large, few, many, kronecker)] == [True, False, True, False, True]
    assert [asked(kronecker, rows, isa="amx") for rows in (MATRIX_ROWS - 1, MATRIX_ROWS)] == [True, False]
    assert not asked(small, dtype=torch.float64)
    side = 2 * LEAST_SAVED  # of factors of which the product saves so many
    for sizes, has in (
        ((side, 3, 5, side), True), ((side - 1, 3, 5, side), False), ((side, 3, 5, side - 1), False),
        ((1, 1, 64, 64), False), ((4, 4, 64, 64), False), ((64, 64, 1, 1), False),
        ((side, 3, MOST_OF_SECOND // 64, 64), True), ((side, 3, MOST_OF_SECOND // 64 + 1, 64), False),
    ):  # fmt: skip
        o1, i1, o2, i2 = sizes
        assert asked(Form("kronecker", sizes, torch.ones(o1, i1), torch.ones(o2, i2))) == has, sizes
    assert not asked(Form("circulant", (2, 2, 3), torch.ones(2, 2, 3)))


def hadamard(o, i, r, dtype):
    weight = drawn(o, i, seed=7).to(dtype)
    return Form("hadamard", (o, i, r), drawn(r, i), drawn(o, r, seed=1), base=Base(DenseWeight(weight))), weight


SIZES = [(1, 1, 1), (77, 53, 5), (129, 96, 16), (17, 31, 3), (1100, 21, 3)]  # beyond a piece, and 16 pieces


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("o", "i", "r"), SIZES)
def test_entries_are_those_of_the_weight_times_the_factors(o, i, r, dtype, backend):
    form, weight = hadamard(o, i, r, dtype)
    exact = weight.double() * (form.second.double() @ form.values.double())
    size = weight.double().abs() * (form.second.double().abs() @ form.values.double().abs())
    made = entries(form, dtype, backend=backend)
    assert made.dtype == dtype
    kind = torch.finfo(dtype)
    assert ((made.double() - exact).abs() <= 1e-6 * size + kind.eps * exact.abs().clamp_min(kind.smallest_normal)).all()


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("o", "i", "r"), SIZES)
def test_gradients_of_entries_are_those_of_autograd(o, i, r, dtype, backend):
    form, weight = hadamard(o, i, r, dtype)
    gradient = drawn(o, i, seed=8).to(dtype)
    leaves = [t.double().requires_grad_() for t in (form.values, form.second)]
    exact = torch.autograd.grad(weight.double() * (leaves[1] @ leaves[0]), leaves, gradient.double())
    for got, wanted in zip(entry_gradients(form, gradient, backend=backend), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=3e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_and_their_gradients_do_not_depend_on_the_number_of_threads(dtype):
    form, weight = hadamard(129, 96, 16, dtype)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append([entries(form, dtype), *entry_gradients(form, weight)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*made, strict=True))


def test_entries_of_a_weight_between_other_columns(backend):
    form, _ = hadamard(5, 19, 2, torch.float32)
    wide = drawn(5, 40)
    form = replace(form, base=Base(DenseWeight(wide[:, 3:22])))
    torch.testing.assert_close(
        entries(form, torch.float32, backend=backend), wide[:, 3:22] * (form.second @ form.values)
    )


def test_entries_of_another_shape_are_refused():
    form, _ = hadamard(7, 5, 2, torch.float32)
    with pytest.raises(ShapeError, match=r"\(7, 4, 2\) multiplies a weight of its own shape; given \(7, 5\)"):
        entries(replace(form, sizes=(7, 4, 2)), torch.float32)
    with pytest.raises(ShapeError, match="given none"):
        entries(replace(form, base=None), torch.float32)
    with pytest.raises(ShapeError, match=r"shape \(5, 7\): it must be that of the matrix \(7, 5\)"):
        entry_gradients(form, torch.ones(5, 7))


def test_only_forms_that_multiply_a_weight_have_entries():
    form, _ = hadamard(7, 5, 2, torch.float32)
    assert [has_entries(form, dtype) for dtype in (*DTYPES, torch.float64)] == [True, True, True, False]
    assert not has_entries(FORMS["sparse"], torch.float32)
