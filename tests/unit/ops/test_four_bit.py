"""NF4 and FP4 against closed forms, bitsandbytes, and float64 products."""

import bitsandbytes.functional as bnb
import pytest
import torch

from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.dispatch import backends
from veneer.ops.four_bit import (
    FourBitLayout,
    dequantize_4bit,
    dequantize_nested_4bit,
    matmul_4bit,
    matmul_t_4bit,
    quantize_4bit,
)
from veneer.ops.four_bit_codes import code_table
from veneer.quant.double_quant import absmax_table, compress_absmax, expand_absmax

OP = "four_bit.dequantize_4bit"
SHAPES = [(1, 1), (13,), (5, 33), (7, 96), (2, 3, 5), (64, 64), (61, 67), (3, 4099)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape, dtype, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(shape) * torch.logspace(-3, 2, shape[-1])
    w.view(-1)[w.numel() // 2 : w.numel() // 2 + 64] = 0  # with luck a whole block, and a zero in any case
    return w.to(dtype)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("quant_type", ["nf4", "fp4"])
@pytest.mark.looped("shape", SHAPES)
def test_codes_and_absmax_are_those_of_bitsandbytes(shape, quant_type, dtype, backend):
    w = weight(shape, dtype)
    for block_size in (32, 64, 4096):
        packed, absmax = quantize_4bit(w, quant_type, block_size, backend=backend)
        theirs, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=block_size)
        assert torch.equal(packed, theirs.view(-1))
        assert torch.equal(absmax, state.absmax)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("quant_type", ["nf4", "fp4"])
@pytest.mark.looped("shape", SHAPES)
def test_values_are_table_times_absmax(shape, quant_type, dtype, backend):
    w = weight(shape, dtype)
    packed, absmax = quantize_4bit(w, quant_type, 64, backend="reference")
    layout = FourBitLayout(shape, quant_type, 64, dtype)
    n = w.numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n].int()
    expected = (code_table(quant_type)[codes] * absmax[torch.arange(n) // 64]).to(dtype).view(shape)
    assert torch.equal(dequantize_4bit(packed, absmax, layout, backend=backend), expected)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("quant_type", ["nf4", "fp4"])
@pytest.mark.looped("shape", [*SHAPES, (129, 257)])  # the last one has more blocks than one scale of absmax
def test_absmax_in_8_bits_gives_the_bits_of_its_own_values(shape, quant_type, dtype):
    packed, absmax = quantize_4bit(weight(shape, dtype), quant_type, 32)
    held, layout = compress_absmax(absmax), FourBitLayout(shape, quant_type, 32, dtype)
    expected = dequantize_4bit(packed, expand_absmax(held), layout, backend="reference")
    nested = held.codes, held.scale, held.offset
    for backend in backends("four_bit.dequantize_nested_4bit"):
        got = dequantize_nested_4bit(packed, nested, absmax_table(packed.device), layout, backend=backend)
        assert torch.equal(got, expected), backend


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("quant_type", ["nf4", "fp4"])
def test_values_at_the_ends_of_what_floats_hold(quant_type, dtype, backend):
    """Subnormal numbers and infinities are rounded as torch rounds them."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)[: 64 * 13 // 2]
    absmax = torch.tensor([1e-45, 3e-41, 1e-38, 9e-31, 2e-30, 1e-6, 0.0, 1.0, 7e4, 9e29, 2e30, 3e38, float("inf")])
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    expected = (code_table(quant_type)[codes].view(13, 64) * absmax[:, None]).to(dtype)
    ours = dequantize_4bit(packed, absmax, FourBitLayout((13, 64), quant_type, 64, dtype), backend=backend)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("quant_type", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes_where_its_own_code_is_right(quant_type, dtype, backend):
    w = weight((37, 192), dtype)
    theirs, state = bnb.quantize_4bit(w, quant_type=quant_type)
    layout = FourBitLayout((37, 192), quant_type, 64, dtype)
    assert torch.equal(
        dequantize_4bit(theirs, state.absmax, layout, backend=backend), bnb.dequantize_4bit(theirs, state)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_value_on_a_midpoint_takes_the_lower_neighbour(quant_type, backend):
    ranked = code_table(quant_type).unique()
    midpoints = (ranked[:-1] + ranked[1:]) / 2
    w = torch.cat([midpoints, torch.ones(64 - len(midpoints))])
    packed, absmax = quantize_4bit(w, quant_type, 64, backend=backend)
    values = dequantize_4bit(packed, absmax, FourBitLayout((64,), quant_type), backend=backend)
    assert torch.equal(values[: len(midpoints)], ranked[:-1])


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_a_block_of_zeros(quant_type, byte, backend):
    packed, absmax = quantize_4bit(torch.zeros(64), quant_type, 64, backend=backend)
    assert packed.tolist() == [byte] * 32
    assert absmax.tolist() == [0.0]


def test_codes_of_an_empty_weight(backend):
    packed, absmax = quantize_4bit(torch.empty(0, 7), "nf4", backend=backend)
    assert (len(packed), len(absmax)) == (0, 0)
    assert dequantize_4bit(packed, absmax, FourBitLayout((0, 7)), backend=backend).shape == (0, 7)


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("rows", [1, 3, 8, 13, 41])
@pytest.mark.looped(("o", "i", "block_size"), [(1, 1, 64), (33, 97, 64), (37, 96, 64), (67, 128, 32), (131, 192, 128)])
def test_products_are_as_exact_as_torch(o, i, block_size, rows, dtype, backend):
    packed, absmax = quantize_4bit(torch.randn(o, i), "nf4", block_size)
    layout = FourBitLayout((o, i), "nf4", block_size)
    exact = dequantize_4bit(packed, absmax, layout).double()
    for op, width, matrix in ((matmul_4bit, i, exact.T), (matmul_t_4bit, o, exact)):
        x = torch.randn(rows, width).to(dtype)
        truth = x.double() @ matrix
        plain = (op(x, packed, absmax, layout, backend="reference").double() - truth).norm()
        ours = (op(x, packed, absmax, layout, backend=backend).double() - truth).norm()
        assert ours <= 2 * plain + 1e-6 * truth.norm()


def test_many_rows_are_multiplied_in_more_than_one_pass(backend):
    o, i, rows = 35, 4160, 131  # 126 rows of 4160 fit at a time
    packed, absmax = quantize_4bit(torch.randn(o, i), "fp4")
    layout = FourBitLayout((o, i), "fp4")
    x = torch.randn(rows, i).bfloat16()
    truth = x.double() @ dequantize_4bit(packed, absmax, layout).double().T
    error = (matmul_4bit(x, packed, absmax, layout, backend=backend).double() - truth).norm() / truth.norm()
    assert error < 4e-3  # bf16 has 8 bits


def test_the_gradient_is_the_transposed_product(backend):
    packed, absmax = quantize_4bit(torch.randn(31, 53), "nf4")
    layout = FourBitLayout((31, 53))
    x = torch.randn(2, 3, 53, requires_grad=True)
    y = matmul_4bit(x, packed, absmax, layout, backend=backend)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, dy)
    w = dequantize_4bit(packed, absmax, layout)
    torch.testing.assert_close(y, x @ w.T)
    torch.testing.assert_close(grad, dy @ w)


@pytest.mark.looped("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.looped("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_refused_and_the_place_named(bad, dtype, backend):
    w = torch.ones(3, 67, dtype=dtype)
    w[1, 5] = bad
    with pytest.raises(NonFiniteError, match=r"1 of its values .* at \(1, 5\)"):
        quantize_4bit(w, "nf4", backend=backend)


def test_layouts_that_are_not_allowed_name_every_problem():
    with pytest.raises(ConfigError, match=r"quant_type is 'nf5'.*block_size is 48.*dtype is torch.int8"):
        FourBitLayout((3,), "nf5", 48, torch.int8)


@pytest.mark.usefixtures("own_checks")
def test_arguments_that_do_not_fit_are_refused():
    packed, absmax = quantize_4bit(torch.randn(5, 64), "nf4")
    layout = FourBitLayout((5, 64))
    with pytest.raises(ShapeError, match=r"got torch\.float64"):
        quantize_4bit(torch.randn(3).double(), "nf4")
    with pytest.raises(ShapeError, match="not uint8 with 160"):
        dequantize_4bit(packed[:-1], absmax, layout)
    with pytest.raises(ShapeError, match="contiguous"):
        dequantize_4bit(packed, torch.randn(10)[::2], layout)
    with pytest.raises(ShapeError, match=r"got dtype torch\.int8"):
        dequantize_4bit(packed, absmax, layout, dtype=torch.int8)
    with pytest.raises(ShapeError, match="must be 64"):
        matmul_4bit(torch.randn(3, 63), packed, absmax, layout)
    with pytest.raises(ShapeError, match="must be 5"):
        matmul_t_4bit(torch.randn(3, 63), packed, absmax, layout)
    with pytest.raises(ShapeError, match="needs a matrix"):
        matmul_4bit(torch.randn(3, 320), packed, absmax, FourBitLayout((320,)))


@pytest.mark.usefixtures("own_checks")
def test_absmax_in_8_bits_of_another_size_is_refused():
    packed, absmax = quantize_4bit(weight((7, 96), torch.float32), "nf4")
    held, layout = compress_absmax(absmax), FourBitLayout((7, 96), "nf4")
    with pytest.raises(ShapeError, match=r"has 11 blocks, .*; given \(10,\) codes of absmax and \(1,\) scales"):
        dequantize_nested_4bit(packed, (held.codes[1:], held.scale, held.offset), absmax_table(packed.device), layout)
