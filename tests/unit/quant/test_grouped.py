"""Whole numbers in groups: codes of every width as a stream of bits, and the layouts of GPTQ and AWQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantized_folders import awq, gptq, hqq, pack_quantized, words
from veneer.errors import ConfigError, FormatError
from veneer.ops import bits as bits_module
from veneer.ops.bits import n_bytes, pack, unpack
from veneer.quant.awq import AwqSpec
from veneer.quant.gptq import BITS, GptqSpec
from veneer.quant.grouped import GroupedSpec
from veneer.quant.hqq import HqqSpec
from veneer.quant.pack_quantized import PackQuantizedSpec

SHAPE = (64, 96)


class LargestTensor(TorchDispatchMode):
    """Counts the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.nbytes for t in tree_leaves(made) if isinstance(t, Tensor))])
        return made


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_packing_makes_nothing_larger_than_the_codes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_module, "TILE_CODES", 8 * 120)
    codes = torch.randint(1 << bits, (97, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    with LargestTensor() as largest:
        packed = pack(codes, bits)
    assert largest.nbytes <= codes.nbytes
    assert torch.equal(unpack(packed, bits, 120), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_a_stream_of_bits(bits: int) -> None:
    codes = torch.randint(1 << bits, (5, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (5, n_bytes(37, bits))
    assert torch.equal(unpack(packed, bits, 37), codes)
    for row, held in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << bits * place for place, code in enumerate(row))
        assert bytes(held) == stream.to_bytes(packed.shape[1], "little")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_in_any_order(bits: int, layout: str) -> None:
    """Values, products and the tensors that are written back; inputs lie in groups at random."""
    tensors, weight = gptq(bits, 32, layout, shuffled=True).encode(torch.Generator().manual_seed(bits), SHAPE)
    spec, parts = GptqSpec(shape=SHAPE, bits=bits, group=32, less_one=layout == "gptq").from_disk(tensors)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in parts.items()} == spec.part_layout()
    frozen = spec.bind(parts)
    assert torch.equal(frozen.dense(torch.float32), weight)
    assert frozen.nbytes == sum(part.nbytes for part in parts.values())
    x, dy = torch.randn(3, 2, 96), torch.randn(3, 2, 64)
    assert torch.allclose(frozen.matmul(x), x @ weight.T, atol=1e-5)
    assert torch.allclose(frozen.matmul_t(dy), dy @ weight, atol=1e-5)
    back = spec.to_disk(parts)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_without_g_idx_groups_are_neighbours() -> None:
    tensors, weight = gptq(4, 32, "gptq", shuffled=False).encode(torch.Generator().manual_seed(3), SHAPE)
    del tensors["g_idx"]
    spec, parts = GptqSpec(shape=SHAPE, bits=4, group=32, ordered=True).from_disk(tensors)
    assert "order" not in parts
    assert torch.equal(spec.bind(parts).dense(torch.float32), weight)


def test_awq() -> None:
    tensors, weight = awq(16).encode(torch.Generator().manual_seed(5), SHAPE)
    spec, parts = AwqSpec(shape=SHAPE, group=16).from_disk(tensors)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in parts.items()} == spec.part_layout()
    assert torch.equal(spec.bind(parts).dense(torch.float32), weight)
    back = spec.to_disk(parts)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hqq(bits: int, dtype: torch.dtype) -> None:
    """Zeros are no whole numbers: the difference is rounded to the scale's dtype too."""
    tensors, weight = hqq(bits, 16, dtype).encode(torch.Generator().manual_seed(bits), SHAPE)
    spec, parts = HqqSpec(shape=SHAPE, bits=bits, group=16).from_disk(tensors)
    assert torch.equal(spec.bind(parts).dense(torch.float32), weight)
    back = spec.to_disk(parts)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_quantized_in_any_order(bits: int) -> None:
    tensors, weight = pack_quantized(bits, 24).encode(torch.Generator().manual_seed(bits), SHAPE)
    spec, parts = PackQuantizedSpec(shape=SHAPE, bits=bits, group=24).from_disk(tensors)
    assert torch.equal(spec.bind(parts).dense(torch.float32), weight)
    back = spec.to_disk(parts)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_rows_that_do_not_fill_a_word() -> None:
    """37 inputs of four bits are padded; a scale for the matrix is one for each row."""
    codes = torch.arange(3 * 37).view(3, 37) % 16
    scale = torch.tensor([0.37])
    tensors = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([3, 37])}
    spec, parts = PackQuantizedSpec(shape=(3, 37), bits=4, group=None, zeros=None).from_disk(tensors)
    assert torch.equal(spec.bind(parts).dense(), (codes - 8) * scale)
    assert torch.equal(spec.to_disk(parts)["weight_packed"], tensors["weight_packed"])


def test_widths_that_words_do_not_take() -> None:
    with pytest.raises(FormatError, match="40 inputs do not fill words"):
        GptqSpec(shape=(64, 40), bits=3, group=None).from_disk({})
    with pytest.raises(FormatError, match="20 outputs are not a multiple of 8"):
        AwqSpec(shape=(20, 32), group=16).from_disk({})


def test_quantizing_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="merge into 16 bits"):
        GroupedSpec(shape=SHAPE, bits=4, group=32).quantize(torch.ones(SHAPE))
