"""The laws of every storage format: products against the dense weight, gradients, dtypes, copies, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradients import has_exact_gradients
from launch import program
from veneer.errors import NonFiniteError
from veneer.quant import fp4, fp8, int8, nf4
from veneer.quant.dense import DenseWeight
from veneer.records.frozen import FrozenWeight

Quantize = Callable[..., FrozenWeight]

FORMATS: dict[str, Quantize] = {
    "nf4": lambda w, **k: nf4.quantize(w, double_quant=False, **k),
    "nf4 double": nf4.quantize,
    "fp4": lambda w, **k: fp4.quantize(w, double_quant=False, **k),
    "fp4 double": fp4.quantize,
    "int8": int8.quantize,
    "fp8": fp8.quantize,
}
SHAPES = [(1, 1), (7, 3), (13, 64), (64, 31), (127, 96), (5, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

formats = pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)


def weight(o: int = 19, i: int = 37, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(o, i, generator=torch.Generator().manual_seed(o * 1000 + i)) * 0.05).to(dtype)


def inputs(i: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, i, generator=torch.Generator().manual_seed(i)).to(dtype)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_the_dense_weight(quantize: Quantize, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """At most twice torch's own error in that dtype, both against float64."""
    o, i = shape
    frozen = quantize(weight(o, i))
    exact, x, dy = frozen.dense(torch.float64), inputs(i, dtype), inputs(o, dtype)
    rounding = torch.finfo(dtype).eps
    plain = error(x @ exact.to(dtype).T, x.double() @ exact.T)
    plain_t = error(dy @ exact.to(dtype), dy.double() @ exact)
    y, dx = frozen.matmul(x), frozen.matmul_t(dy)
    assert y.dtype == dx.dtype == dtype
    assert y.shape == (2, 5, o)
    assert dx.shape == (2, 5, i)
    assert error(y, x.double() @ exact.T) <= 2 * plain + rounding
    assert error(dx, dy.double() @ exact) <= 2 * plain_t + rounding


@formats
def test_the_dense_weight_is_close_to_what_was_quantized(quantize: Quantize) -> None:
    w = weight(67, 131)
    limit = {"int8": 0.02}.get(next(name for name, q in FORMATS.items() if q is quantize), 0.14)
    assert error(quantize(w).dense(), w.double()) < limit
    assert error(quantize(w).dense(), w.double()) > 1e-3  # it was quantized at all


@formats
def test_gradient_in_x(quantize: Quantize) -> None:
    frozen = quantize(weight(11, 7))
    x = inputs(7, torch.float64).requires_grad_()
    assert has_exact_gradients(frozen.matmul, (x,), twice=True)
    dy = inputs(11, torch.float64).requires_grad_()
    assert has_exact_gradients(frozen.matmul_t, (dy,))


@formats
def test_the_backward_pass_keeps_no_tensor(quantize: Quantize) -> None:
    """Nothing is saved for the backward pass: neither x nor a dense weight."""
    saved: list[Tensor] = []
    frozen = quantize(weight())
    x = inputs(37).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = frozen.matmul(x)
    assert saved == []
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, frozen.dense(torch.float32).sum(0).expand_as(x), atol=1e-5)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_dtype(quantize: Quantize, dtype: torch.dtype) -> None:
    """The product happens in compute_dtype, the result is in the input's."""
    x = inputs(37)
    y = quantize(weight(), compute_dtype=dtype).matmul(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, quantize(weight()).matmul(x.to(dtype)).float())


@formats
def test_autocast_decides_as_for_a_dense_layer(quantize: Quantize) -> None:
    frozen = quantize(weight(), compute_dtype=torch.float32)
    x = inputs(37).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen.matmul(x)
        dense = DenseWeight(frozen.dense(torch.float32)).matmul(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(y, quantize(weight()).matmul(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@formats
def test_dense_dtypes(quantize: Quantize) -> None:
    frozen = quantize(weight(dtype=torch.bfloat16))
    assert frozen.dense().dtype == torch.bfloat16
    wide = frozen.dense(torch.float32)
    assert torch.equal(frozen.dense(), wide.bfloat16())
    assert torch.equal(frozen.dense(torch.float64), wide.double())


@formats
def test_a_copy_computes_the_same(quantize: Quantize) -> None:
    frozen = quantize(weight())
    assert torch.equal(copy.deepcopy(frozen).matmul(inputs(37)), frozen.matmul(inputs(37)))


def test_under_torch_compile() -> None:
    """In a process of its own: the shape checks of the test run would be compiled too."""
    script = """
import torch
from veneer.quant import int8, nf4
x = torch.randn(2, 5, 37, requires_grad=True)
for format in (nf4, int8):
    frozen = format.quantize(torch.randn(19, 37))
    y = torch.compile(lambda t: frozen.matmul(t) * 3, backend="eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, frozen.matmul(x) * 3)
    assert torch.allclose(grad, 3 * frozen.dense(torch.float32).sum(0).expand_as(x), atol=1e-4)
"""
    done = program(script)
    assert done.returncode == 0, done.stderr


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(quantize: Quantize, value: float) -> None:
    w = weight()
    w[3, 5] = value
    with pytest.raises(NonFiniteError):
        quantize(w)


@pytest.mark.parametrize("quantize", [nf4.quantize, fp4.quantize])
def test_double_quantization_takes_4_127_bits_a_parameter(quantize: Quantize) -> None:
    """4 + 8/64 + 32/(64·256): QLoRA, section 3."""
    frozen = quantize(torch.randn(512, 1024))
    bits = 8 * (frozen.nbytes - 4) / (512 * 1024)  # one float32 beside it: the mean of the scales
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(bits, 3) == 4.127


def test_bytes_without_double_quantization() -> None:
    assert 8 * nf4.quantize(torch.randn(512, 1024), double_quant=False).nbytes / (512 * 1024) == 4.5
    assert int8.quantize(torch.randn(7, 13)).nbytes == 7 * 13 + 4 * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_dense_weight_multiplies_in_float32_where_16_bits_are_slow(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same product within rounding, its gradient too, and nothing wide is kept for the backward pass."""
    frozen = DenseWeight(weight(19, 37, torch.float32 if autocast else dtype))
    exact, kept = frozen.dense(torch.float64), []

    def products() -> list[Tensor]:
        x = inputs(37, dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = frozen.matmul(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return [y.detach(), dx, frozen.matmul_t(dy)]

    dy = inputs(19, dtype)
    wanted = [inputs(37, dtype).double() @ exact.T, dy.double() @ exact, dy.double() @ exact]
    plain = products()
    monkeypatch.setattr("veneer.ops.matmul.float32_is_faster", lambda: True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = products()
    assert not kept
    for got, own, right in zip(found, plain, wanted, strict=True):
        assert got.dtype == own.dtype
        assert error(got, right) <= max(2 * error(own, right), torch.finfo(dtype).eps)
