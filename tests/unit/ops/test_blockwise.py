"""Blockwise 8-bit codes and double quantization against bitsandbytes and the nearest table value."""

import bitsandbytes.functional as bnb
import pytest
import torch

from stand_in import OnDevice, stand_in
from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise
from veneer.quant import double_quant
from veneer.quant.double_quant import compress_absmax, expand_absmax

OP = "blockwise.quantize_blockwise"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed))


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("signed", [True, False])
@pytest.mark.looped(("n", "block_size"), [(1, 256), (255, 256), (1000, 256), (1031, 61)])
def test_each_value_takes_the_nearest_code(n, block_size, signed, dtype, backend):
    torch.manual_seed(n)
    x = torch.randn(n) ** 3
    x = (x if signed else x.abs()).to(dtype)
    x[: min(n // 3, block_size)] = 0
    code = dynamic_map(signed)
    codes, absmax = quantize_blockwise(x, code, block_size, backend=backend)
    for first in range(0, n, block_size):
        block = x[first : first + block_size].float()
        most = block.abs().max()
        assert absmax[first // block_size] == most
        scaled = block * (1 / most) if most > 0 else block
        distance = (scaled[:, None].double() - code.double()).abs()
        chosen = distance.gather(1, codes[first : first + block_size, None].long())[:, 0]
        assert (chosen <= distance.min(dim=1).values + 1e-7).all()
    values = dequantize_blockwise(codes, absmax, code, block_size, dtype=dtype, backend=backend)
    assert torch.equal(values, (code[codes.long()] * absmax.repeat_interleave(block_size)[:n]).to(dtype))


@pytest.mark.parametrize("signed", [True, False])
def test_a_tie_takes_the_lower_index_and_zeros_the_index_of_zero(signed, backend):
    code = dynamic_map(signed)
    midpoints = (code[:-1] + code[1:]) / 2
    codes, _ = quantize_blockwise(torch.cat([midpoints, torch.ones(1), torch.zeros(256)]), code, backend=backend)
    assert codes[:255].tolist() == list(range(255))
    assert codes[256:].unique().tolist() == [127 if signed else 0]


def test_codes_are_those_of_the_reference(backend):
    x = torch.randn(3, 5077).bfloat16()
    ours = quantize_blockwise(x, dynamic_map(), backend=backend)
    for mine, theirs in zip(ours, quantize_blockwise(x, dynamic_map(), backend="reference"), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("n", [1, 255, 257, 5003])
def test_double_quantization_is_that_of_bitsandbytes(n, backend):
    torch.manual_seed(n)
    absmax = torch.rand(n) ** 4 * 3 + 0.01
    compressed = compress_absmax(absmax)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(compressed.codes, codes)
    assert torch.equal(compressed.scale, state.absmax)
    assert compressed.nbytes == n + 4 * -(-n // 256) + 4
    assert torch.equal(
        expand_absmax(compressed, backend=backend), bnb.dequantize_blockwise(codes, state) + absmax.mean()
    )


def test_equal_absmax_survive_double_quantization():
    assert expand_absmax(compress_absmax(torch.full((300,), 0.7))).unique().tolist() == pytest.approx([0.7])


@pytest.mark.usefixtures("own_checks")
def test_arguments_that_do_not_fit_are_refused(backend):
    code = dynamic_map()
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        quantize_blockwise(torch.tensor([1.0, float("nan")]), code, backend=backend)
    with pytest.raises(ConfigError, match="block_size is 0"):
        quantize_blockwise(torch.ones(3), code, 0)
    with pytest.raises(ShapeError, match=r"got torch\.int32"):
        quantize_blockwise(torch.ones(3, dtype=torch.int32), code)
    with pytest.raises(ShapeError, match=r"float32 \(256,\)"):
        quantize_blockwise(torch.ones(3), code[:255])
    with pytest.raises(ShapeError, match="contiguous"):
        quantize_blockwise(torch.ones(3), torch.zeros(512)[::2])
    with pytest.raises(ShapeError, match=r"absmax \(2,\)"):
        dequantize_blockwise(torch.zeros(257, dtype=torch.uint8), torch.ones(1), code)
    with pytest.raises(ShapeError, match=r"got torch\.int8"):
        dequantize_blockwise(torch.zeros(3, dtype=torch.uint8), torch.ones(1), code, dtype=torch.int8)
    with pytest.raises(ShapeError, match="vector of float32"):
        compress_absmax(torch.ones(2, 2))


def test_the_table_of_maxima_is_sent_to_a_gpu_once():
    double_quant._table_on_gpu.cache_clear()
    absmax = torch.rand(521, generator=torch.Generator().manual_seed(5))
    packed = compress_absmax(absmax)
    with stand_in() as crossings:
        held = double_quant.CompressedAbsmax(*(OnDevice(part) for part in (packed.codes, packed.scale, packed.offset)))
        first, second = expand_absmax(held), expand_absmax(held)
    double_quant._table_on_gpu.cache_clear()
    assert crossings.sent == 1
    assert torch.equal(first.host, expand_absmax(packed, backend="reference"))
    assert torch.equal(second.host, first.host)
