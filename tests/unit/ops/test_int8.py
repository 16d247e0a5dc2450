"""Row-wise int8 against bitsandbytes and float64 products."""

import bitsandbytes.functional as bnb
import pytest
import torch

from veneer.errors import NonFiniteError, ShapeError
from veneer.ops.int8 import dequantize_int8, matmul_int8, matmul_t_int8, quantize_int8

OP = "int8.quantize_int8"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", [(1, 1), (3, 5), (37, 96), (61, 257)])
def test_codes_and_values_are_those_of_bitsandbytes(shape, dtype, backend):
    torch.manual_seed(1)
    w = torch.randn(shape).to(dtype)
    theirs, scb, _ = bnb.int8_vectorwise_quant(w)
    codes, absmax = quantize_int8(w, backend=backend)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, scb)
    expected = bnb.int8_vectorwise_dequant(theirs, scb)
    assert torch.equal(dequantize_int8(codes, absmax, dtype=dtype, backend=backend), expected.to(dtype))


def test_a_row_of_zeros_and_halves_to_even(backend):
    w = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, -0.0, 0.0, 0.0]])
    codes, absmax = quantize_int8(w, backend=backend)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert absmax.tolist() == [127.0, 0.0]


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("rows", [1, 9])
def test_products_are_as_exact_as_torch(rows, dtype, backend):
    codes, absmax = quantize_int8(torch.randn(37, 67))
    exact = codes.double() * absmax.double()[:, None] / 127
    for op, width, matrix in ((matmul_int8, 67, exact.T), (matmul_t_int8, 37, exact)):
        x = torch.randn(rows, width).to(dtype)
        truth = x.double() @ matrix
        plain = (op(x, codes, absmax, backend="reference").double() - truth).norm()
        assert (op(x, codes, absmax, backend=backend).double() - truth).norm() <= 2 * plain


def test_the_gradient_is_the_transposed_product(backend):
    codes, absmax = quantize_int8(torch.randn(31, 53))
    x = torch.randn(2, 3, 53, requires_grad=True)
    y = matmul_int8(x, codes, absmax, backend=backend)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(grad, dy @ dequantize_int8(codes, absmax))


def test_a_row_that_is_not_finite_is_refused_and_named(backend):
    w = torch.ones(5, 7)
    w[3, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="the first is row 3"):
        quantize_int8(w, backend=backend)


@pytest.mark.usefixtures("own_checks")
def test_arguments_that_do_not_fit_are_refused():
    codes, absmax = quantize_int8(torch.randn(5, 7))
    with pytest.raises(ShapeError, match="takes a matrix"):
        quantize_int8(torch.randn(5))
    with pytest.raises(ShapeError, match="contiguous int8 matrix"):
        dequantize_int8(codes.T, absmax)
    with pytest.raises(ShapeError, match="one value a row"):
        dequantize_int8(codes, absmax[:-1])
    with pytest.raises(ShapeError, match=r"got torch\.int8"):
        dequantize_int8(codes, absmax, dtype=torch.int8)
    with pytest.raises(ShapeError, match="must be 7"):
        matmul_int8(torch.randn(2, 6), codes, absmax)
    with pytest.raises(ShapeError, match="must be 5"):
        matmul_t_int8(torch.randn(2, 6), codes, absmax)
