"""Columns scaled and shifted: float64's values, rounded once; the same for any layout and number of threads."""

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.scale import scale_columns, scale_columns_backward

OP = "scale.forward"
SHAPES = [(1, 1), (3, 17), (70, 131), (257, 64), (5, 1536)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = [(True, True), (True, False), (False, True)]


def rows_for(backend, n):
    """At most two of Triton's tiles of 64 rows, since its interpreter takes its time for each row."""
    return min(n, 70) if backend == "triton" else n


def draw(n, d, dtype):
    generator = torch.Generator().manual_seed(n * d)
    z, dy = torch.randn(2, n, d, generator=generator).to(dtype)
    scale, bias = 1 + torch.randn(2, d, generator=generator) / 3
    return z, dy, scale, bias


@pytest.mark.looped(("scaled", "shifted"), PARTS)
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("n", "d"), SHAPES)
def test_forward(n, d, dtype, scaled, shifted, backend):
    z, _, scale, bias = draw(rows_for(backend, n), d, dtype)
    scale, bias = scale if scaled else None, bias if shifted else None
    got = scale_columns(z, scale, bias, backend=backend)
    wide = z.float() * (1 if scale is None else scale) + (0 if bias is None else bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wide.to(dtype), rtol=1e-6 if backend == "triton" else 0, atol=0)


@pytest.mark.looped(("scaled", "with_z", "with_bias"), [(1, 1, 1), (1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 1)])
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("n", "d"), SHAPES)
def test_backward(n, d, dtype, scaled, with_z, with_bias, backend):
    z, dy, scale, _ = draw(rows_for(backend, n), d, dtype)
    dz = torch.full_like(dy, torch.nan) if scaled else None
    given = scale if scaled else None
    dscale, dbias = scale_columns_backward(
        dy, z if with_z else None, given, dz, with_bias=bool(with_bias), backend=backend
    )
    if scaled:
        assert torch.equal(dz, (dy.float() * scale).to(dtype))
    for got, exact, asked in ((dscale, dy.double() * z.double(), with_z), (dbias, dy.double(), with_bias)):
        assert (got is not None) == bool(asked)
        if asked:
            assert got.dtype == torch.float32
            assert ((got - exact.sum(0)).abs() <= 4e-7 * exact.abs().sum(0)).all()


@pytest.mark.usefixtures("own_checks")
@pytest.mark.parametrize(("n", "d"), [(8192, 1024), (300, 1000), (8192, 14336), (40, 4096)])
def test_programs_of_few_columns_share_the_rows(n, d, monkeypatch):
    """A key layer's columns alone would keep 32 of 132 processors busy. Programs are as many as there is work for."""
    pytest.importorskip("triton", reason="needs the package triton")
    from veneer.ops.triton import scale as kernels

    grids = []
    monkeypatch.setattr(kernels, "processors", lambda x: 132)
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    dy = torch.empty(n, d)
    kernels.backward(dy, dy, torch.ones(d), torch.empty(n, d), True)
    [(tiles, parts)] = grids
    assert tiles == -(-d // 32)
    assert 132 <= tiles * parts <= 2 * 132 or parts in (1, -(-n // 64))


def test_in_place_and_between_other_columns(backend):
    z, dy, scale, bias = draw(33, 75, torch.bfloat16)
    expected = scale_columns(z, scale, bias, backend="reference")
    wide = torch.full((33, 100), 7.0, dtype=torch.bfloat16)
    part = wide[:, 3:78]
    part.copy_(z)
    assert scale_columns(part, scale, bias, part, backend=backend) is part
    assert torch.equal(part, expected)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 78:] == 7).all()
    dz = dy.clone()
    dscale, _ = scale_columns_backward(dz, z, scale, dz, backend=backend)
    assert torch.equal(dz, (dy.float() * scale).bfloat16())
    assert torch.allclose(dscale.double(), (dy.double() * z.double()).sum(0), atol=1e-4)
    turned = z.T.contiguous().T  # its columns lie together, its rows do not
    assert torch.equal(scale_columns(turned, scale, bias, turned, backend=backend), expected)


def test_what_has_no_rows_in_memory(backend):
    n = rows_for(backend, 517)
    z, _, scale, bias = draw(n, 600, torch.float32)
    dy = torch.tensor(0.5).expand(n, 600)  # as the gradient of a sum comes
    turned = z.T.contiguous().T
    expected = scale_columns(z, scale, bias, backend="reference")
    dz = torch.empty(n, 600)
    for _ in range(1 if backend == "triton" else 5):  # memory that was given back is soon used again
        assert torch.equal(scale_columns(turned, scale, bias, backend=backend), expected) or backend == "triton"
        dscale, dbias = scale_columns_backward(dy, turned, scale, dz, with_bias=True, backend=backend)
        assert torch.equal(dz, (0.5 * scale).expand(n, 600))
        assert torch.allclose(dscale, 0.5 * z.sum(0), rtol=1e-4, atol=1e-4)
        assert torch.allclose(dbias, torch.full((600,), n * 0.5))


def test_wider_vectors_and_float64(backend):
    z, dy, scale, bias = draw(7, 13, torch.float32)
    got = scale_columns(z, scale.double(), bias.double(), backend=backend)
    assert torch.equal(got, (z.double() * scale.double() + bias.double()).float())
    dz = torch.empty(7, 13, dtype=torch.float64)
    dscale, dbias = scale_columns_backward(dy.double(), z.double(), scale, dz, with_bias=True, backend=backend)
    assert dscale.dtype == dbias.dtype == torch.float64
    assert torch.equal(dz, dy.double() * scale)


def test_any_number_of_threads(backend):
    z, dy, scale, _ = draw(rows_for(backend, 517), 300, torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        found.append(scale_columns_backward(dy, z, scale, dy.clone(), with_bias=True, backend=backend))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("own_checks")
def test_errors():
    z = torch.zeros(3, 5)
    with pytest.raises(ShapeError, match=r"scale must be \(5,\).*\(4,\)"):
        scale_columns(z, torch.ones(4), None)
    with pytest.raises(ShapeError, match=r"\(3, 5\).*\(5, 3\)"):
        scale_columns(z, None, None, torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="given without a scale"):
        scale_columns_backward(z, z, None, None)
    with pytest.raises(ShapeError, match="must be alike"):
        scale_columns_backward(z, z.double(), torch.ones(5), z.clone())


def test_nothing():
    empty = torch.zeros(0, 5)
    assert scale_columns(empty, torch.ones(5), None).shape == (0, 5)
    dscale, dbias = scale_columns_backward(empty, empty, torch.ones(5), empty.clone(), with_bias=True)
    assert dscale.tolist() == dbias.tolist() == [0] * 5
