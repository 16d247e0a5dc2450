"""GLoRA against its formula in closed form and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods_in_peft import assert_equals_peft, site
from veneer import GloraConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"config_D_E": "vector"}  # a number that all outputs share changes nothing in front of a LayerNorm
ZEROS = [f"glora_{path}.zeros" for path in "ABCDE"]
KINDS = {
    "products": {},
    "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "numbers": {"config_A_B": "constant", "config_C": "none"},
    "bias": {"config_A_B": "none", "config_C": "vector", "config_D_E": "vector"},
    "weight": {"config_C": "none", "config_D_E": "none"},
    "D and E": {"config_A_B": "none", "config_C": "none", "config_D_E": "vector"},
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_the_weight_and_the_bias_of_products():
    w, c, x_d, x_u, y_d, y_u = drawn(7, 5), drawn(7), drawn(7, 2), drawn(2, 5), drawn(7, 2), drawn(2, 5)
    z_d, z_u, d, e = drawn(5, 2), drawn(2, 1), drawn(1), drawn(1)
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w), bias=c)
    params = {"glora_A_Xd": x_d, "glora_A_Xu": x_u, "glora_B_Xd": y_d, "glora_B_Xu": y_u}
    params |= {"glora_C_Xd": z_d, "glora_C_Xu": z_u, "glora_D_X": d, "glora_E_X": e}
    config = GloraConfig(r=2)
    assert {name: tuple(value.shape) for name, value in params.items()} == config.shapes(place)
    weight, bias = fold_linear(config.lower(place, params), w, c)
    torch.testing.assert_close(weight, w + w * (x_d @ x_u) + y_d @ y_u)
    torch.testing.assert_close(bias, c + c * d + e + w @ (z_d @ z_u)[:, 0])


def test_the_weight_and_the_bias_of_vectors():
    w, c, a, b, of_inputs, d, e = drawn(7, 5), drawn(7), drawn(7, 1), drawn(7, 1), drawn(5, 1), drawn(7), drawn(7)
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w), bias=c)
    params = {"glora_A_X": a, "glora_B_X": b, "glora_C_X": of_inputs, "glora_D_X": d, "glora_E_X": e}
    record = GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector").lower(place, params)
    weight, bias = fold_linear(record, w, c)
    torch.testing.assert_close(weight, w + w * a + b)
    torch.testing.assert_close(bias, c + c * d + e + w @ of_inputs[:, 0])


@every_kind
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(GloraConfig, "GloraConfig", tmp_path, "biased", fixed=ZEROS, r=3, init_weights=False, **fields)


@every_kind
def test_a_start_is_the_base(fields):
    w, c = torch.randn(7, 5), torch.randn(7)
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w), bias=c)
    config = GloraConfig(r=3, **fields)
    weight, bias = fold_linear(config.lower(place, config.init(place)), w, c)
    assert torch.equal(weight, w)
    assert torch.equal(bias, c)


def test_a_layer_without_a_bias_has_zeros_in_place_of_c_d_and_e(tmp_path):
    assert GloraConfig(r=2).shapes(site("q_proj", 7, 5)) == {
        "glora_A_Xd": (7, 2), "glora_A_Xu": (2, 5), "glora_B_Xd": (7, 2), "glora_B_Xu": (2, 5),
        "glora_C_zeros": (5, 1), "glora_D_zeros": (7,), "glora_E_zeros": (7,),
    }  # fmt: skip
    assert GloraConfig(config_A_B="none", config_C="none").reads_weight is False


def test_a_changed_weight_of_the_base_is_the_one_that_is_read():
    torch.manual_seed(2)
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    model = get_peft_model(nn.Sequential(layer), GloraConfig(r=2, target_modules=["0"], init_weights=False)).eval()
    w, found = layer.weight.detach(), layer.adapters["default"]
    before = model(x).detach()
    layer.weight = nn.Parameter(2 * w, requires_grad=False)
    a, b = (found[f"glora_{path}_Xd"] @ found[f"glora_{path}_Xu"] for path in "AB")
    torch.testing.assert_close(model(x), x @ (2 * w + 2 * w * a + b).T)
    assert not torch.allclose(model(x), before)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        GloraConfig(r=0)
    with pytest.raises(ConfigError, match="config_C='constant' must be 'lora', 'vector' or 'none'"):
        GloraConfig(config_C="constant")
    with pytest.raises(ConfigError, match="GLoRA at q_proj needs the frozen weight"):
        GloraConfig(r=2).lower(site("q_proj", 7, 5), {})
    config, place = GloraConfig(**KINDS["D and E"]), replace(site("q_proj", 7, 5), has_bias=True)
    with pytest.raises(ConfigError, match="GLoRA at q_proj needs the frozen bias: load the base model"):
        config.lower(place, config.init(place))
