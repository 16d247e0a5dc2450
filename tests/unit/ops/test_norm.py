"""Norms: against torch in float64, errors at most twice torch's own in the same dtype."""

import pytest
import torch
from torch.nn import functional

from bench.kernels.differentiable import layer_norm, rms_norm
from veneer.errors import ShapeError
from veneer.ops import norm

SHAPES = [(1, 2), (3, 7), (2, 5, 67), (13, 576), (1, 1031)]
DTYPES = [torch.float32, torch.bfloat16]
OP = "norm.rms_norm_forward"
EPS = 1e-5


def draw(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 3 + 0.7
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    dy = torch.randn(shape, generator=generator)
    return [t.to(dtype) for t in (x, weight, bias, dy)]


def results(function, tensors, dtype, dy):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def torch_rms(offset):
    def plain(x, weight):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return normed * (weight + offset)

    return plain


def torch_layer(x, weight, bias):
    return functional.layer_norm(x, weight.shape, weight, bias, EPS)


def require_close(ours, plain, exact):
    for name, got, theirs, truth in zip(("y", "dx", "dweight", "dbias"), ours, plain, exact, strict=False):
        allowed = 2 * (theirs.double() - truth).abs().max() + 1e-6 * truth.abs().max()
        assert got.dtype == theirs.dtype
        assert (got.double() - truth).abs().max() <= allowed, name


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", SHAPES)
@pytest.mark.looped("offset", [0.0, 1.0])
def test_rms_norm_and_its_gradients(shape, dtype, offset, backend):
    x, weight, _, dy = draw(shape, dtype)
    ours = results(lambda *t: rms_norm(*t, EPS, offset, backend=backend), (x, weight), dtype, dy)
    plain = results(torch_rms(offset), (x, weight), dtype, dy)
    require_close(ours, plain, results(torch_rms(offset), (x, weight), torch.float64, dy))


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", SHAPES)
def test_layer_norm_and_its_gradients(shape, dtype, backend):
    *tensors, dy = draw(shape, dtype)
    ours = results(lambda *t: layer_norm(*t, EPS, backend=backend), tensors, dtype, dy)
    require_close(ours, results(torch_layer, tensors, dtype, dy), results(torch_layer, tensors, torch.float64, dy))


def test_rows_apart_in_memory(backend):
    wide = torch.randn(11, 97, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(53, generator=torch.Generator().manual_seed(2))
    view, copy = wide[:, 13:66], wide[:, 13:66].contiguous()
    assert torch.equal(rms_norm(view, weight, EPS, backend=backend), rms_norm(copy, weight, EPS, backend=backend))


def test_no_rows_give_gradients_of_zero(backend):
    x, weight, bias = torch.zeros(0, 7, requires_grad=True), torch.ones(7, requires_grad=True), torch.ones(7)
    rms_norm(x, weight, EPS, backend=backend).sum().backward()
    layer_norm(x, weight, bias, EPS, backend=backend).sum().backward()
    assert x.grad.shape == (0, 7)
    assert torch.equal(weight.grad, torch.zeros(7))


def test_float64_gradcheck(backend):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((3, 7), 7, 7)
    )
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, EPS, 1.0, backend=backend), (x, weight))
    assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, EPS, backend=backend), (x, weight, bias))


def test_frozen_weight_has_no_gradient():
    x, weight, _, dy = draw((3, 7), torch.float32)
    _, dweight = norm.rms_norm_backward(dy, x, weight, norm.rms_norm_forward(x, weight, EPS)[1])
    assert dweight is None


@pytest.mark.usefixtures("own_checks")
def test_weight_that_does_not_fit():
    with pytest.raises(ShapeError, match=r"weight.*\(7,\)"):
        rms_norm(torch.zeros(3, 7), torch.zeros(5), EPS)
    with pytest.raises(ShapeError, match=r"bias.*\(7,\)"):
        layer_norm(torch.zeros(3, 7), torch.zeros(7), torch.zeros(5), EPS)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("kind", ["rms", "layer"])
def test_a_gradient_that_is_added(kind, dtype, backend):
    """One that lies between other columns too; two roundings at most."""
    x, weight, bias, dy = draw((5, 37), dtype)
    added = torch.randn(5, 61, generator=torch.Generator().manual_seed(3)).to(dtype)[:, 3:40]
    if kind == "rms":
        statistics = norm.rms_norm_forward(x, weight, EPS, backend=backend)[1:]
        back = norm.rms_norm_backward
    else:
        statistics = norm.layer_norm_forward(x, weight, bias, EPS, backend=backend)[1:]
        back = norm.layer_norm_backward
    (alone, *_), (both, *_) = (back(dy, x, weight, *statistics, added=a, backend=backend) for a in (None, added))
    rounded = torch.finfo(dtype).eps * (alone.abs() + both.abs()).double()
    assert ((both.double() - alone.double() - added.double()).abs() <= rounded).all()


@pytest.mark.usefixtures("own_checks")
def test_a_gradient_to_add_is_like_x():
    x, weight, _, dy = draw((3, 7), torch.float32)
    with pytest.raises(ShapeError, match=r"the gradient to add is \(2, 7\)"):
        norm.rms_norm_backward(dy, x, weight, torch.ones(3), added=dy[1:])
