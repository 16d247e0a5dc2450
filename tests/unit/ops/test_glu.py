"""Gated units: torch's activations in float64, errors at most twice torch's own in the same dtype."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from bench.kernels.differentiable import glu
from veneer.errors import ConfigError, ShapeError
from veneer.ops.glu import ACTIVATIONS, SWIGLU_OAI, glu_backward, unit_backward, unit_forward

OP = "glu.glu_forward"
TORCH = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}


def draw(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    gate, up, dh = torch.randn(3, *shape, generator=generator) * 4
    gate.view(-1)[:1] = 40.0
    gate.view(-1)[-1:] = -40.0  # both flat ends of the activation
    return [t.to(dtype) for t in (gate, up, dh)]


def results(function, gate, up, dh, dtype):
    leaves = [gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()]
    h = function(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(dtype))]


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("activation", ACTIVATIONS)
@pytest.mark.looped("shape", [(1, 1), (3, 17), (2, 3, 131), (5, 1536)])
def test_value_and_gradients(shape, activation, dtype, backend):
    gate, up, dh = draw(shape, dtype)
    plain_function = lambda g, u: TORCH[activation](g) * u  # noqa: E731
    ours = results(lambda g, u: glu(g, u, activation, backend=backend), gate, up, dh, dtype)
    plain = results(plain_function, gate, up, dh, dtype)
    exact = results(plain_function, gate, up, dh, torch.float64)
    for name, got, theirs, truth in zip(("h", "dgate", "dup"), ours, plain, exact, strict=True):
        allowed = 2 * (theirs.double() - truth).abs().max() + 4e-7 * truth.abs().max() + 1e-30
        assert got.dtype == dtype
        assert (got.double() - truth).abs().max() <= allowed, name


@pytest.mark.looped("owns_dh", [False, True])
@pytest.mark.looped("owns_inputs", [False, True])
@pytest.mark.looped("activation", ACTIVATIONS)
def test_halves_of_one_buffer_overwritten(activation, owns_inputs, owns_dh, backend):
    gate, up, dh = draw((7, 37), torch.float32)
    expected = glu_backward(dh.double(), gate.double(), up.double(), activation, backend="reference")
    joined = torch.cat([gate, up], dim=1)
    halves = joined[:, :37], joined[:, 37:]
    before = [t.clone() for t in (*halves, dh)]
    out = glu_backward(dh, *halves, activation, owns_dh=owns_dh, owns_inputs=owns_inputs, backend=backend)
    owned = (owns_inputs, owns_inputs, owns_dh)
    assert tuple(o.data_ptr() == t.data_ptr() for o, t in zip(out, (*halves, dh), strict=True)) == owned
    for got, wanted in zip(out, expected, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=2e-6, atol=2e-5)
    for given, was, is_owned in zip((*halves, dh), before, owned, strict=True):
        assert is_owned or torch.equal(given, was)


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("shape", [(1, 1), (3, 17), (2, 131), (5, 1536)])
def test_clamped_units_of_alternating_gates(shape, dtype, backend):
    """Values on both sides of the bounds; rows that lie within wider ones."""
    gate, up, dh = draw(shape, dtype)
    up[..., -1:] = -9.0
    wide = torch.stack([gate, 2 * up], dim=-1).flatten(-2)
    inner = torch.nn.functional.pad(wide, (3, 5))[:, 3:-5]
    leaf = inner.double().requires_grad_()
    g, u = leaf[:, ::2].clamp(max=7), leaf[:, 1::2].clamp(-7, 7)
    right = (u + 1) * g * torch.sigmoid(1.702 * g)
    right.backward(dh.double())
    h = unit_forward(inner, SWIGLU_OAI, backend=backend)
    given, slopes = dh.clone(), inner.clone()
    unit_backward(given, slopes, SWIGLU_OAI, backend=backend)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21
    assert h.dtype == dtype
    for got, wanted in ((h, right), (given, right), (slopes, leaf.grad)):
        assert (got.double() - wanted).abs().max() <= unit * wanted.abs().max() + 1e-20


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_gradcheck(activation, backend):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation, backend=backend), pair)


@pytest.mark.usefixtures("own_checks")
def test_errors():
    with pytest.raises(ConfigError, match=r"'swish' is unknown.*silu"):
        glu(torch.zeros(3), torch.zeros(3), "swish")
    with pytest.raises(ShapeError, match=r"\(3,\).*\(5,\)"):
        glu(torch.zeros(3), torch.zeros(5), "silu")
