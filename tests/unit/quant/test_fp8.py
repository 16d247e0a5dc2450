"""FP8 against transformers' own code and the formula of the format, on odd shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from quantized_folders import FP8_VALUES, fp8_codes, random_scales
from veneer.errors import FormatError, NonFiniteError
from veneer.quant.fp8 import KINDS, Fp8Spec, quantize


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_code(kind: torch.dtype) -> None:
    """Each finite code stands for its value times the scale."""
    values = FP8_VALUES[kind]
    finite = values.isfinite().nonzero()[:, 0]
    codes = finite.to(torch.uint8).view(1, -1).view(kind)
    scale = torch.tensor([[0.37]])
    spec, parts = Fp8Spec((1, len(finite)), block=None).from_disk({"weight": codes, "weight_scale_inv": scale})
    assert torch.equal(spec.bind(parts).dense(), values[finite][None] * scale)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_those_of_transformers(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    codes, _ = fp8_codes(generator, (6 * 5, 4 * 7), torch.float8_e4m3fn)
    scale = random_scales(generator, (6, 4))
    bytes_of = torch.randint(118, 131, (6, 4), generator=generator, dtype=torch.uint8)
    scale = bytes_of if scale_dtype == torch.uint8 else scale.to(scale_dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)
    spec = Fp8Spec((30, 28), dtype, block=(5, 7))
    found, parts = spec.from_disk({"weight": codes, "weight_scale_inv": scale})
    assert torch.equal(found.bind(parts).dense(), theirs)


def test_ragged_blocks_channels_and_rounding() -> None:
    """Blocks at the edges are cut; a rounded format rounds the product to the scale's dtype."""
    generator = torch.Generator().manual_seed(2)
    codes, values = fp8_codes(generator, (13, 11), torch.float8_e4m3fn)
    scale = random_scales(generator, (3, 4))
    spec = Fp8Spec((13, 11), block=(5, 3))
    found, parts = spec.from_disk({"weight": codes, "weight_scale_inv": scale})
    wide = scale[torch.arange(13)[:, None] // 5, torch.arange(11) // 3]
    assert torch.equal(found.bind(parts).dense(), values * wide)
    rows = random_scales(generator, (13, 1)).to(torch.bfloat16)
    channel = Fp8Spec((13, 11), block=None, suffix="weight_scale", rounded=True)
    found, parts = channel.from_disk({"weight": codes, "weight_scale": rows})
    assert torch.equal(found.bind(parts).dense(), (values.to(torch.bfloat16) * rows).float())


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_quantized_as_transformers_does(scale_fmt: str) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(3))
    weight[:128, :128] = 0
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})
    dtype = torch.float32 if scale_fmt == "float" else torch.float8_e8m0fnu
    parts = Fp8Spec((256, 384), scale_dtype=dtype).quantize(weight)
    assert torch.equal(parts["weight"].view(torch.uint8), theirs["x.weight"].view(torch.uint8))
    assert torch.equal(parts["scale"].float(), theirs["x.weight_scale_inv"].float())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_of_small_values_are_never_zero(scale_dtype: torch.dtype) -> None:
    """A row of values below what its dtype's scales reach keeps its magnitude, and can be read again."""
    size = 1e-5 if scale_dtype == torch.float16 else 1e-37
    weight = torch.randn(3, 37, generator=torch.Generator().manual_seed(4))
    weight[1] = size * weight[1] / weight[1].abs().max()
    spec = Fp8Spec((3, 37), block=None, scale_dtype=scale_dtype, scale_shape=(3, 1))
    again, parts = spec.from_disk(spec.to_disk(spec.quantize(weight)))
    found = again.bind(parts).dense().double()
    assert ((found - weight).norm(dim=1) / weight.double().norm(dim=1) < 0.04).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_rounded_values_need_scales_that_are_floats(dtype: torch.dtype) -> None:
    scale = torch.full((3, 1), 120, dtype=torch.uint8).view(dtype)
    codes = torch.ones(3, 5).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"allowed: torch\.float32, torch\.bfloat16, torch\.float16\. Fetch"):
        Fp8Spec((3, 5), block=None, rounded=True).from_disk({"weight": codes, "weight_scale_inv": scale})


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.ones(3, 5)
    weight[1, 2] = float("inf")
    with pytest.raises(NonFiniteError):
        quantize(weight)
    codes = torch.full((3, 5), 0x7D, dtype=torch.uint8).view(torch.float8_e5m2)
    with pytest.raises(FormatError, match="NaN or infinity"):
        Fp8Spec((3, 5), block=None).from_disk({"weight": codes, "weight_scale_inv": torch.ones(1)})
