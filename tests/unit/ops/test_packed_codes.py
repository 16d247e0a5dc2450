"""Packed codes: layout, bytes, the values that they stand for, and products, which are those of dense panels."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.four_bit import FourBitLayout, dequantize_4bit, quantize_4bit
from veneer.ops.int8 import dequantize_int8, quantize_int8
from veneer.ops.packed import PackedWeight
from veneer.ops.packed_codes import PackedCodes

OP = "packed_codes.matmul"
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33, 100]
FEW = (1, 33)  # for the reference, which decodes all for each product
# (coding, outputs, inputs, values of a block)
FORMS = [
    ("nf4", 1, 16, 64), ("nf4", 37, 64, 64), ("fp4", 67, 48, 32), ("nf4", 131, 80, 4096), ("fp4", 64, 192, 128),
    ("int8", 1, 1, 0), ("int8", 67, 33, 0), ("int8", 131, 97, 0), ("int8", 48, 64, 0),
]  # fmt: skip
FLOATS = [torch.float32, torch.bfloat16]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed_of(coding, o, i, block, dtype=torch.bfloat16, backend=None):
    """A packed weight, its codes, and the values that they stand for."""
    weight = draw(o, i) * torch.linspace(0.1, 3.0, o)[:, None]
    weight[:, : i // 3] *= 7
    weight[1:2] = 0
    if coding == "int8":
        codes, absmax = quantize_int8(weight)
        return (
            PackedCodes.pack_int8(codes, absmax, dtype, backend=backend),
            codes,
            dequantize_int8(codes, absmax, dtype=dtype),
        )
    packed, absmax = quantize_4bit(weight, coding, block)
    layout = FourBitLayout((o, i), coding, block)
    values = dequantize_4bit(packed, absmax, layout, dtype=dtype)
    return PackedCodes.pack_4bit(packed, absmax, layout, dtype, backend=backend), packed, values


@pytest.mark.looped("form", FORMS)
def test_codes_come_back_and_stand_for_the_same_values(form, backend):
    made, codes, values = packed_of(*form, backend=backend)
    assert torch.equal(made.panels, packed_of(*form, backend="reference")[0].panels)
    assert torch.equal(made.codes(backend=backend), codes)
    assert torch.equal(made.dense(backend=backend), values)
    wide = packed_of(*form, torch.float32)[2]
    assert torch.equal(made.dense(torch.float32, backend=backend), wide)
    assert torch.equal(made.dense(torch.float16, backend=backend), wide.half())
    assert made.nbytes == made.panels.numel() == (made.shape[0] + -made.shape[0] % 16) * made.output_bytes


def test_bytes_of_a_weight():
    assert packed_of("nf4", 64, 192, 64)[0].nbytes * 8 == 64 * 192 * 4.5
    assert packed_of("int8", 64, 192, 0)[0].nbytes == 64 * (192 + 4)


@pytest.mark.looped("x_dtype", FLOATS)
@pytest.mark.looped("dtype", FLOATS)
@pytest.mark.looped("form", FORMS)
def test_products_are_those_of_the_dense_panels(form, dtype, x_dtype, backend):
    made, _, values = packed_of(*form, dtype)
    dense = PackedWeight.pack(values)
    for n in ROWS if backend == "cpu" else FEW:
        x, onto = draw(n, form[2], dtype=x_dtype), draw(n, form[1], dtype=x_dtype)
        assert torch.equal(made.matmul(x, backend=backend), dense.matmul(x, backend=backend)), n
        assert torch.equal(made.matmul(x, onto=onto, backend=backend), dense.matmul(x, onto=onto, backend=backend)), n


@pytest.mark.parametrize("form", [("nf4", 83, 208, 64), ("int8", 83, 201, 0)])
def test_what_other_products_left_in_scratch_memory_takes_no_part(form, backend):
    made, _, values = packed_of(*form)
    nans = torch.full((40, 512), float("nan"))
    PackedWeight.pack(torch.full((256, 512), float("nan"))).matmul(nans, backend=backend)
    packed_of("nf4", 256, 512, 64, torch.float32)[0].matmul(nans, backend=backend)
    x = draw(40, form[2], dtype=torch.bfloat16)
    assert torch.equal(made.matmul(x, backend=backend), PackedWeight.pack(values).matmul(x, backend=backend))


@pytest.mark.parametrize("form", [("nf4", 83, 208, 64), ("int8", 83, 201, 0)])
def test_five_hundred_rows_written_where_asked(form, backend):
    made, _, values = packed_of(*form)
    wide = draw(512, 300, dtype=torch.bfloat16)
    x, rows = wide[:, 11 : 11 + form[2]], torch.full((512, 101), 7.0)
    made.matmul(x, out=rows[:, 5:88], backend=backend)
    expected = PackedWeight.pack(values).matmul(x, onto=torch.zeros(512, 83), backend=backend)
    assert torch.equal(rows[:, 5:88], expected)
    assert (rows[:, :5] == 7).all()
    assert (rows[:, 88:] == 7).all()


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("form", [("nf4", 304, 64), ("fp4", 304, 512), ("int8", 301, 0)])
def test_a_row_does_not_depend_on_its_companions(form, x_dtype, backend):
    (coding, i, block), in_threads = form, backend == "cpu"
    made, _, _ = packed_of(coding, 1203 if in_threads else 43, i, block)  # the reference decodes all in every call
    # torch's own product, which the reference is, may take another order for another number of rows
    same = torch.equal if in_threads else partial(torch.allclose, rtol=0.01, atol=0.001)
    x = draw(100, i, dtype=x_dtype)
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


def test_no_rows(backend):
    assert packed_of("nf4", 5, 32, 64)[0].matmul(draw(0, 32), backend=backend).shape == (0, 5)


@pytest.mark.usefixtures("own_checks")
def test_what_does_not_fit_is_refused():
    packed, absmax = quantize_4bit(draw(3, 24), "nf4", 64)
    with pytest.raises(ShapeError, match=r"width that is a multiple of 16.*given \(3, 24\)"):
        PackedCodes.pack_4bit(packed, absmax, FourBitLayout((3, 24)), torch.bfloat16)
    packed, absmax = quantize_4bit(draw(4, 32) * 1e-35, "nf4", 64)
    with pytest.raises(ShapeError, match="absmax from 1e-30 to 1e"):
        PackedCodes.pack_4bit(packed, absmax, FourBitLayout((4, 32)), torch.bfloat16)
    codes, absmax = quantize_int8(draw(4, 32))
    with pytest.raises(ShapeError, match=r"float32 or bfloat16.*float16"):
        PackedCodes.pack_int8(codes, absmax, torch.float16)
    made = PackedCodes.pack_int8(codes, absmax, torch.float32)
    with pytest.raises(ShapeError, match=r"x must be \(n, 32\).*given \(2, 31\)"):
        made.matmul(draw(2, 31))
