"""A quantized layer: what it computes, its state dict, copies, casts, and going back to a dense layer."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import FormatError
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.int8 import Int8Spec
from veneer.quant.spec import StorageSpec

SPECS: dict[str, StorageSpec] = {
    "nf4": FourBitSpec(FourBitLayout((19, 37), "nf4")),
    "nf4 double": FourBitSpec(FourBitLayout((19, 37), "nf4"), double_quant=True),
    "fp4 double": FourBitSpec(FourBitLayout((19, 37), "fp4"), double_quant=True),
    "int8": Int8Spec((19, 37)),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def dense(bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(37, 19, bias=bias)


def inputs() -> Tensor:
    return torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(1))


@specs
@pytest.mark.parametrize("bias", [True, False])
def test_forward(spec: StorageSpec, bias: bool) -> None:
    layer = QuantLinear.from_dense(dense(bias), spec)
    expected = inputs() @ layer.frozen_format().dense(torch.float32).T
    if layer.bias is not None:
        expected = expected + layer.bias
    assert torch.allclose(layer(inputs()), expected, atol=1e-6)
    exact = dense(bias)(inputs())
    assert (layer(inputs()) - exact).norm().item() / exact.norm().item() < 0.2


@specs
def test_a_conv1d_is_stored_as_w(spec: StorageSpec) -> None:
    """GPT-2's layer keeps Wᵀ; its codes are those of W, and it comes back as a Conv1D."""
    conv = Conv1D(19, 37)
    with torch.no_grad():
        conv.weight.copy_(dense().weight.T)
        conv.bias.copy_(dense().bias)
    layer = QuantLinear.from_dense(conv, spec)
    twin = QuantLinear.from_dense(dense(), spec)
    assert torch.equal(layer(inputs()), twin(inputs()))
    back = layer.to_dense()
    assert isinstance(back, Conv1D)
    assert torch.equal(back.weight, layer.frozen_format().dense().T)
    assert torch.allclose(back(inputs()), layer(inputs()), atol=1e-6)


@specs
def test_to_dense(spec: StorageSpec) -> None:
    layer = QuantLinear.from_dense(dense(), spec)
    back = layer.to_dense(torch.bfloat16)
    assert type(back) is nn.Linear
    assert back.weight.dtype == torch.bfloat16
    assert torch.equal(back.weight, layer.frozen_format().dense(torch.bfloat16))
    assert back.bias.dtype == torch.bfloat16
    assert not back.weight.requires_grad


@specs
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_cast_leaves_the_codes_and_scales_alone(spec: StorageSpec, cast: str) -> None:
    layer = QuantLinear.from_dense(dense(), spec)
    before = {name: part.clone() for name, part in layer.parts().items()}
    layer = layer.to(torch.float16) if cast == "to" else getattr(layer, cast)()
    assert {n: p.dtype for n, p in layer.parts().items()} == {n: p.dtype for n, p in before.items()}
    assert all(torch.equal(part, before[name]) for name, part in layer.parts().items())
    assert layer.bias is not None
    assert layer.bias.dtype != torch.float32


@specs
def test_copies_and_other_devices(spec: StorageSpec) -> None:
    layer = QuantLinear.from_dense(dense(), spec)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(inputs()), layer(inputs()))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert all(part.is_meta for part in copy.deepcopy(layer).to("meta").parts().values())


@specs
def test_state_dict_goes_both_ways(spec: StorageSpec) -> None:
    layer = QuantLinear.from_dense(dense(), spec)
    other = QuantLinear.from_dense(nn.Linear(37, 19), spec)
    state = nn.ModuleDict({"deep": layer}).state_dict()
    assert all(key.startswith("deep.") for key in state)
    holder = nn.ModuleDict({"deep": other})
    assert holder.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other(inputs()), layer(inputs()))
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    empty = QuantLinear(spec, nn.Parameter(torch.zeros(19)))
    assert not empty.is_filled
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(inputs()), layer(inputs()))


@specs
def test_state_dict_with_faults(spec: StorageSpec) -> None:
    layer = QuantLinear.from_dense(dense(), spec)
    state = layer.state_dict()
    missing, unexpected = layer.load_state_dict({"bias": state["bias"], "more": torch.ones(1)}, strict=False)
    assert missing == ["weight"]
    assert unexpected == ["more"]
    without_bias = {key: value for key, value in state.items() if key != "bias"}
    assert layer.load_state_dict(without_bias, strict=False).missing_keys == ["bias"]
    scales = "SCB" if "SCB" in state else "weight.absmax"
    with pytest.raises(RuntimeError, match="cannot be read"):
        layer.load_state_dict({key: value for key, value in state.items() if key != scales})
    assert torch.equal(layer(inputs()), QuantLinear.from_dense(dense(), spec)(inputs()))


def test_a_weight_of_another_shape() -> None:
    layer = QuantLinear.from_dense(dense(), SPECS["nf4"])
    other = Int8Spec((7, 5))
    with pytest.raises(FormatError, match="does not fit"):
        layer.fill(other, other.quantize(torch.ones(7, 5)))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_of_bitsandbytes(quant_type: str, double_quant: bool) -> None:
    """Both layers read the other's state dict and then hold the same weight."""
    theirs = bnb.nn.Linear4bit(37, 19, compress_statistics=double_quant, quant_type=quant_type)
    theirs.load_state_dict(dense().state_dict())
    theirs = theirs.to("cpu")
    ours = QuantLinear(FourBitSpec(FourBitLayout((19, 37), "nf4")), nn.Parameter(torch.zeros(19)))
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(inputs()), theirs(inputs()), atol=1e-5)
    for key, tensor in theirs.state_dict().items():
        if "quant_state" not in key:
            assert torch.equal(ours.state_dict()[key], tensor), key
