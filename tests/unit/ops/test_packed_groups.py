"""Packed codes of formats with groups: values to the bit, products of dense panels, codes that come back."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.bits import pack
from veneer.ops.code_groups import CodeGroups
from veneer.ops.packed import PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.quant import packing
from veneer.quant.fp4_blocks import Fp4BlockWeight
from veneer.quant.fp8 import Fp8Weight
from veneer.quant.ggml import GgmlSpec
from veneer.quant.grouped import GroupedWeight
from veneer.quant.packing import packed_codes, unpacked_codes

OP = "packed_codes.matmul"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 16, 23, 24, 25, 33, 100]
FEW = (1, 33)  # for the reference, which decodes all for each product
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def ggml(kind, o=150, i=512):
    """Rows in another order, of sizes that differ by input."""
    w = torch.randn(o, i, generator=generator()) * torch.linspace(0.1, 2.0, i)
    w[3] = 0
    spec = GgmlSpec((o, i), kind, reordered=True)
    return spec.bind(spec.quantize(w) | {"order": torch.randperm(o, generator=generator()).int()})


def grouped(bits, dtype, zeros, group=32, o=85, i=224):
    """Whole numbers; scales so small that halves of values are subnormal are among them."""
    groups = -(-i // group)
    codes = torch.randint(1 << bits, (o, i), generator=generator(), dtype=torch.int32).to(torch.uint8)
    scales = ((torch.rand(o, groups, generator=generator()) + 0.1) / 30).to(dtype)
    scales[7] *= 2.0**-10
    held = None if zeros is None else (torch.rand(o, groups, generator=generator(6)) * ((1 << bits) - 1)).to(zeros)
    return GroupedWeight(pack(codes, bits), scales, bits, (o, i), held)


def fp8(kind, block, scale, rounded=False, o=77, i=160):
    most = 0x77 if kind == torch.float8_e4m3fn else 0x7A
    codes = torch.randint(most, (o, i), generator=generator(), dtype=torch.int32).to(torch.uint8)
    codes |= torch.randint(2, (o, i), generator=generator(6), dtype=torch.uint8) << 7
    grid = -(-o // block[0]), -(-i // block[1])
    scales = (
        torch.randint(100, 140, grid, generator=generator(), dtype=torch.uint8)
        if scale == torch.uint8
        else ((torch.rand(grid, generator=generator()) + 0.1) / 300).to(scale)
    )
    return Fp8Weight(codes.view(kind), scales, block, rounded=rounded)


def fp4(block, scale, overall=None, divides=False, o=67, i=96):
    codes = torch.randint(256, (o, i // 2), generator=generator(), dtype=torch.int32).to(torch.uint8)
    scales = torch.randint(100, 140, (o, i // block), generator=generator(), dtype=torch.int32).to(torch.uint8)
    scales = scales if scale == torch.uint8 else (scales - 90).float().to(scale)
    return Fp4BlockWeight(codes, scales, overall, divides)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {
    **{kind: partial(ggml, kind) for kind in KINDS},
    **{f"whole {bits}": partial(grouped, bits, F16, torch.uint8) for bits in (1, 2, 3, 4, 5, 6, 8)},
    **{f"middle {bits}": partial(grouped, bits, BF16, None, 112) for bits in (2, 3, 4, 6, 8)},
    "middle 4, float16": partial(grouped, 4, F16, None, 112),
    "bfloat16, zeros": partial(grouped, 4, BF16, torch.uint8, 16),
    "float32, zeros": partial(grouped, 4, F32, torch.uint8, 224),
    "hqq 4": partial(grouped, 4, F16, F16),
    "hqq 8": partial(grouped, 8, F16, F16),
    "hqq 3, bfloat16": partial(grouped, 3, BF16, BF16),
    "hqq 8, float32": partial(grouped, 8, F32, F32),
    "deepseek": partial(fp8, E4M3, (5, 128), F32),
    "powers": partial(fp8, E5M2, (1, 32), torch.uint8),
    "a scale a row": partial(fp8, E4M3, (1, 157), BF16, True, i=157),
    "a scale": partial(fp8, E5M2, (77, 33), F16, True, i=33),
    "mxfp4": partial(fp4, 32, torch.uint8),
    "nvfp4": partial(fp4, 16, E4M3, torch.tensor(0.37), True),
    "modelopt": partial(fp4, 48, E4M3, torch.tensor(0.037)),
}
formats = pytest.mark.looped("name", FORMATS)


def draw(*shape, dtype=F32):
    return torch.randn(shape, generator=generator(sum(shape))).to(dtype)


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """A matrix is packed in several parts."""
    monkeypatch.setattr(packing, "PACKED_VALUES", 1 << 14)


@formats
def test_values_are_those_of_the_format(name, backend):
    frozen = FORMATS[name]()
    values = frozen.dense(F32)
    assert values.isfinite().all()
    assert values.unique().numel() > 8
    for dtype in (F32, BF16):
        made = packed_codes(frozen, dtype)
        assert made.shape == frozen.shape
        assert torch.equal(made.dense(F32, backend=backend), values)
        assert torch.equal(made.dense(backend=backend), values.to(dtype))
    assert made.nbytes == (made.shape[0] + -made.shape[0] % 16) * made.output_bytes


@pytest.mark.looped("x_dtype", [F32, BF16])
@pytest.mark.looped("dtype", [F32, BF16])
@formats
def test_products_are_those_of_the_dense_panels(name, dtype, x_dtype, backend):
    frozen = FORMATS[name]()
    made, dense = packed_codes(frozen, dtype), PackedWeight.pack(frozen.dense(F32).to(dtype))
    for n in ROWS if backend == "cpu" else FEW:
        x, onto = draw(n, made.shape[1], dtype=x_dtype), draw(n, made.shape[0], dtype=x_dtype)
        assert torch.equal(made.matmul(x, backend=backend), dense.matmul(x, backend=backend)), n
        assert torch.equal(made.matmul(x, onto=onto, backend=backend), dense.matmul(x, onto=onto, backend=backend)), n


@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["Q4_K", "whole 4", "a scale a row"])
def test_a_row_does_not_depend_on_its_companions(name, x_dtype, backend):
    in_threads = backend == "cpu"
    # torch's own product, which the reference is, may take another order for another number of rows
    same = torch.equal if in_threads else partial(torch.allclose, rtol=0.01, atol=0.001)
    frozen = FORMATS[name](o=1203 if in_threads else 43)
    made = packed_codes(frozen, BF16)
    x = draw(100, made.shape[1], dtype=x_dtype)
    x[5, 17] = float("nan")  # stays in its row
    before = torch.get_num_threads()
    alone = torch.cat([made.matmul(x[r : r + 1], backend=backend) for r in range(100)])
    try:
        for threads in (1, 2, 3) if in_threads else (before,):
            torch.set_num_threads(threads)
            for n in (*ROWS, 97):
                together = made.matmul(x[:n], backend=backend)
                assert same(together.nan_to_num(3.0), alone[:n].nan_to_num(3.0)), (n, threads)
    finally:
        torch.set_num_threads(before)
    assert alone.isnan().any(1).nonzero().tolist() == [[5]]


@formats
def test_codes_come_back(name):
    frozen = FORMATS[name]()
    found = unpacked_codes(frozen, packed_codes(frozen, BF16))
    if name in KINDS:
        assert found is None
        return
    assert torch.equal(found.view(torch.uint8).view(-1), frozen.codes.view(torch.uint8).view(-1))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("Q4_0", 4.5),
        ("Q8_0", 8.5),
        ("Q4_1", 5),
        ("IQ4_NL", 4.5),
        ("Q5_0", 8.5),
        ("Q4_K", 6),
        ("Q6_K", 10),
        ("Q2_K", 6),
        ("Q3_K", 5),
        ("whole 3", 4),
        ("middle 2", 2 + 16 / 112),
        ("mxfp4", 4.25),
    ],
)
def test_bytes_of_a_weight(name, bits):
    """Scales of 16 bits, or of 8, stay so; those of the K types are products, and float32."""
    made = packed_codes(FORMATS[name](o=128), F32)
    assert made.nbytes * 8 == 128 * made.shape[1] * bits


def test_what_has_no_packed_form():
    assert packed_codes(FORMATS["whole 4"](group=8), BF16) is None  # groups of less than 16 inputs
    assert packed_codes(FORMATS["whole 4"](), F16) is None
    wide = grouped(4, F32, None)
    assert packed_codes(wide, BF16) is not None
    wide.scales[84, 6] = 1e-31
    assert packed_codes(wide, BF16) is None
    order = GroupedWeight(wide.codes, wide.scales.abs(), 4, wide.shape, order=torch.arange(224).int())
    assert packed_codes(order, BF16) is None


@pytest.mark.usefixtures("own_checks")
def test_parts_are_whole_panels():
    part = CodeGroups(torch.zeros(40, 32, dtype=torch.uint8), "signed4", torch.ones(40, 1))
    assert PackedCodes.pack_groups([part], F32).shape == (40, 32)
    with pytest.raises(ShapeError, match=r"64 rows or a multiple at a time; given \(40, 32\) behind 40 rows"):
        PackedCodes.pack_groups([part, part], F32)
    with pytest.raises(ShapeError, match="no rows to pack"):
        PackedCodes.pack_groups([], F32)
    odd = CodeGroups(torch.zeros(4, 40, dtype=torch.uint8), "signed4", torch.ones(4, 1))
    with pytest.raises(ShapeError, match="whose width is a multiple of 16"):
        PackedCodes.pack_groups([odd], F32)
