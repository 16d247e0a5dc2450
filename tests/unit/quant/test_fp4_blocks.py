"""MXFP4 and NVFP4: values against transformers' own code, rounding to nearest even, and what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantized_folders import FP4_VALUES, mxfp4, nvfp4
from veneer.errors import FormatError, NonFiniteError, ShapeError
from veneer.quant.fp4_blocks import encoded
from veneer.quant.mxfp4 import Mxfp4Spec
from veneer.quant.nvfp4 import Nvfp4Spec

SHAPE = (13, 96)
SPECS = [Mxfp4Spec(SHAPE), Nvfp4Spec(SHAPE), Nvfp4Spec(SHAPE, divides=False)]
specs = pytest.mark.parametrize("spec", SPECS, ids=["mxfp4", "nvfp4", "modelopt"])


def test_mxfp4_is_that_of_transformers() -> None:
    tensors, _ = mxfp4().encode(torch.Generator().manual_seed(1), SHAPE)
    spec, parts = Mxfp4Spec(SHAPE, torch.bfloat16).from_disk(tensors)
    blocks = tensors["weight_packed"].view(1, 13, 3, 16)
    theirs = convert_moe_packed_tensors(blocks, tensors["weight_scale"].view(1, 13, 3), dtype=torch.bfloat16)
    assert torch.equal(spec.bind(parts).dense(), theirs[0].T)


def test_values_are_rounded_to_the_nearest_and_to_even() -> None:
    values = torch.tensor([0.0, 0.24, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 99.0])
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0])
    assert torch.equal(FP4_VALUES[encoded(values).int()], wanted)
    assert torch.equal(FP4_VALUES[encoded(-values).int()], -wanted)


@specs
def test_quantized_values_are_the_nearest_of_their_block(spec: Any) -> None:
    """No value of a block is nearer; the largest is kept up to the scale's rounding; zeros stay zeros."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 0.03
    weight[4, 32:64] = 0
    frozen = spec.bind(spec.quantize(weight))
    scales = frozen.scales.float() if frozen.overall is not None else 2.0 ** (frozen.scales.float() - 127)
    if frozen.overall is not None:
        scales = scales / frozen.overall if frozen.divides else scales * frozen.overall
    choices = FP4_VALUES * scales.repeat_interleave(96 // scales.shape[1], 1)[:, :, None]
    nearest = (choices - weight[:, :, None]).abs().amin(-1)
    assert torch.allclose((frozen.dense() - weight).abs(), nearest, atol=1e-8)
    assert float((frozen.dense() - weight).norm() / weight.norm()) < 0.13
    assert not frozen.dense()[4, 32:64].any()
    again, parts = spec.from_disk(spec.to_disk(spec.quantize(weight)))
    assert torch.equal(again.bind(parts).dense(), frozen.dense())


@specs
@pytest.mark.parametrize("size", [0.0, 1e-37])
def test_weights_of_zeros_and_of_tiny_values(spec: Any, size: float) -> None:
    weight = torch.linspace(-size, size, 13 * 96).view(SHAPE)
    again, parts = spec.from_disk(spec.to_disk(spec.quantize(weight)))
    assert (again.bind(parts).dense().double() - weight).norm() <= 0.13 * weight.double().norm()


@pytest.mark.parametrize("divides", [True, False])
def test_a_stored_matrix_keeps_its_overall_number_while_its_values_fit(divides: bool) -> None:
    """Values up to 7/6 of the largest are as near to a code as before; a larger one needs another number."""
    tensors, weight = nvfp4(not divides).encode(torch.Generator().manual_seed(3), SHAPE)
    spec, parts = Nvfp4Spec(SHAPE, divides=divides).from_disk(tensors)
    largest = 2688 / spec.overall if divides else 2688 * spec.overall
    weight = weight * (largest / weight.abs().max())
    for factor, kept in ((0.7, True), (1.16, True), (1.17, False)):
        again = spec.quantize(weight * factor)
        overall = torch.tensor(2688 / (largest * factor))
        expected = parts["overall"] if kept else (overall if divides else 1 / overall).view_as(parts["overall"])
        assert torch.allclose(again["overall"], expected, rtol=0 if kept else 1e-6)
        found = spec.bind(again).dense()
        assert (found - weight * factor).norm() <= 0.13 * (weight * factor).norm()


@specs
def test_weights_that_cannot_be_quantized(spec: Any) -> None:
    weight = torch.ones(SHAPE)
    weight[2, 3] = float("nan")
    with pytest.raises(NonFiniteError):
        spec.quantize(weight)
    with pytest.raises(ShapeError, match=r"must be a multiple of (16|32)\. Merge into 16-bit weights instead"):
        type(spec)((13, 40)).quantize(torch.ones(13, 40))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scale", torch.full((13, 6), float("nan")).to(torch.float8_e4m3fn), "holds NaN"),
        ("weight_scale", torch.zeros(13, 6).to(torch.float8_e4m3fn), "78 scales that are zero or negative"),
        ("weight_scale", torch.ones(13, 5).to(torch.float8_e4m3fn), r"weight_scale is .*\(13, 5\)"),
        ("weight_global_scale", torch.zeros(1), "zero or negative"),
        ("weight_global_scale", torch.ones(2), r"weight_global_scale is \(2,\)"),
        ("weight_packed", torch.zeros(13, 96, dtype=torch.uint8), r"weight_packed is .*\(13, 96\)"),
    ],
)
def test_nvfp4_that_cannot_be_read(name: str, value: torch.Tensor, message: str) -> None:
    tensors, _ = nvfp4(modelopt=False).encode(torch.Generator().manual_seed(2), SHAPE)
    with pytest.raises(FormatError, match=message):
        Nvfp4Spec(SHAPE).from_disk(tensors | {name: value})
    with pytest.raises(FormatError, match="missing"):
        Nvfp4Spec(SHAPE).from_disk({key: tensor for key, tensor in tensors.items() if key != name})


def test_mxfp4_that_cannot_be_read() -> None:
    tensors, _ = mxfp4().encode(torch.Generator().manual_seed(2), SHAPE)
    with pytest.raises(FormatError, match="holds NaN"):
        Mxfp4Spec(SHAPE).from_disk(tensors | {"weight_scale": torch.full((13, 3), 255, dtype=torch.uint8)})
    with pytest.raises(FormatError, match="40 inputs are not a multiple of 32"):
        Mxfp4Spec((13, 40)).from_disk(tensors)
