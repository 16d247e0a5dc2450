"""Rotary embedding: a rotation of complex numbers in float64 is the oracle."""

import pytest
import torch

from bench.kernels.differentiable import rotary
from veneer.errors import ShapeError
from veneer.ops.rotary import rotate, rotate_both

OP = "rotary.rotate"


def draw(dtype=torch.float32, batch=2, heads=3, t=11, d=26, half=7):
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(batch, heads, t, d, generator=generator).to(dtype)
    angles = torch.randn(batch, t, half, generator=generator)
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin, interleaved):
    """The pairs as complex numbers, times cos + i sin, in float64."""
    half = cos.shape[-1]
    head = x[..., : 2 * half].double()
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).mT
    spun = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    real = torch.view_as_real(spun)
    flat = (real if interleaved else real.mT).flatten(-2)
    return torch.cat([flat, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.looped("interleaved", [False, True])
@pytest.mark.looped(
    "sizes", [{}, {"d": 64, "half": 32}, {"d": 2, "half": 1, "t": 1}, {"d": 80, "half": 16, "heads": 1}]
)
def test_rotation(sizes, interleaved, dtype, backend):
    x, cos, sin = draw(dtype, **sizes)
    got = rotate(x, cos, sin, interleaved=interleaved, backend=backend)
    exact = turned(x, cos, sin, interleaved)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_transpose(interleaved, backend):
    """Also where cos² + sin² is not one (YaRN scales the tables)."""
    q, cos, sin = draw(torch.float32)
    k = q[:, :2].clone()
    cos, sin = cos * 1.3, sin * 1.3
    leaves = [q.requires_grad_(), k.requires_grad_()]
    outs = rotary(*leaves, cos, sin, interleaved=interleaved, backend=backend)
    dys = [torch.randn_like(o) for o in outs]
    got = torch.autograd.grad(outs, leaves, dys)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad([turned(t, cos, sin, interleaved) for t in wide], wide, [d.double() for d in dys])
    for g, e in zip(got, exact, strict=True):
        assert torch.allclose(g.double(), e, rtol=0, atol=2e-6)


def test_transposed_view_in_place_and_shared_tables(backend):
    x, cos, sin = draw()
    rows = x.transpose(1, 2).contiguous()  # (b, t, heads, d), as a projection writes it
    expected = rotate(x, cos[:1], sin[:1], backend="reference")
    out = rotate(rows.transpose(1, 2), cos[:1], sin[:1], in_place=True, backend=backend)
    assert out.data_ptr() == rows.data_ptr()
    assert torch.allclose(rows.transpose(1, 2), expected, rtol=0, atol=1e-6)
    back = rotate(out, cos[:1], sin[:1], inverse=True, backend=backend)
    assert torch.allclose(back, x, rtol=0, atol=2e-6)
    assert torch.allclose(rows.transpose(1, 2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (18, 18), (1, 5)])
def test_queries_and_keys_turn_together(heads, kv_heads, inverse, backend):
    q, cos, sin = draw(torch.bfloat16, heads=heads)
    k = draw(torch.bfloat16, heads=kv_heads)[0].transpose(1, 2).contiguous().transpose(1, 2)
    how = {"interleaved": inverse, "inverse": inverse, "backend": backend}
    expected = [rotate(x, cos, sin, **how) for x in (q, k)]
    rotate_both(q, k, cos, sin, **how)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("shape", [(2, 0, 5, 8), (0, 3, 5, 8), (2, 3, 0, 8)])
def test_nothing_to_turn(backend, shape):
    tables = torch.ones(1, shape[2], 4)
    assert rotate(torch.empty(shape), tables, tables, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("x", "table"),
    [((2, 3, 5, 8), (2, 5, 5)), ((2, 3, 5, 8), (3, 5, 4)), ((2, 3, 5, 8), (1, 4, 4)), ((3, 5, 8), (1, 5, 4))],
)
@pytest.mark.usefixtures("own_checks")
def test_tables_that_do_not_fit(x, table):
    with pytest.raises(ShapeError, match="rotary takes"):
        rotate(torch.zeros(x), torch.zeros(table), torch.zeros(table))


@pytest.mark.usefixtures("own_checks")
def test_queries_and_keys_of_two_batches_are_refused():
    tables = torch.ones(1, 5, 4)
    with pytest.raises(ShapeError, match="of one batch; given 2 and 3"):
        rotate_both(torch.zeros(2, 3, 5, 8), torch.zeros(3, 1, 5, 8), tables, tables)
