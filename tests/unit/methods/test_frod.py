"""FRoD against its decomposition and PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from methods_in_peft import TARGETS, TOKENS, assert_drops_inputs, assert_equals_peft, base, every_base, site
from veneer import FrodConfig, PeftModel, PsoftConfig, get_peft_model
from veneer.errors import ConfigError, FormatError, TargetError
from veneer.methods.frod import block_of, kind_of
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"sparse_rate": 0.2}
PEFT_ERROR = 1e-4  # its U and V are in float32, and it multiplies them out
FIXED = ["frod_V.self_attn_q_proj", "frod_V.self_attn_v_proj", "frod_V.mlp_down_proj"]


def test_it_takes_the_place_of_the_weight():
    w = torch.randn(7, 5, dtype=torch.float64)
    place, config = replace(site("a.q_proj", 7, 5), weight=DenseWeight(w)), FrodConfig(sparse_rate=0.2)
    params = {n: x.double() if x.is_floating_point() else x for n, x in config.init(place).items()}
    u, v, first = config.derived(place, params)["U"].double(), params["frod_V"], params["frod_lambda_l"]
    torch.testing.assert_close(u @ torch.diag(first) @ v.T, w, rtol=1e-4, atol=1e-4)
    assert params["frod_s_indices"].shape == (2, 5)
    assert (params["frod_s_indices"][0] != params["frod_s_indices"][1]).all()
    trained = first + torch.randn(5, dtype=torch.float64)
    values = torch.randn(5, dtype=torch.float64)
    s = torch.zeros(5, 5, dtype=torch.float64)
    for value, (row, column) in zip(values, params["frod_s_indices"].T, strict=True):
        s[row, column] += value
    record = config.lower(place, params | {"frod_lambda_l": trained, "frod_lambda_s_values": values})
    expected = u @ (torch.diag(trained) + s) @ v.T
    torch.testing.assert_close(fold_linear(record, w)[0], expected, rtol=1e-4, atol=1e-4)
    x, dy = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(record.changes[0].matmul(x), x @ record.added().T)
    torch.testing.assert_close(record.changes[0].matmul_t(dy), dy @ record.added())


@every_base
def test_it_equals_peft(on, tmp_path):
    fixed = ["frod_s_indices", "frod_s_size", "frod_V"]
    kinds = ["self_attn_q_proj", "self_attn_v_proj", "mlp_down_proj", "attention_query_key_value"]
    fixed = [f"{name}.{kind}" for name in fixed for kind in (*kinds, "mlp_dense_4h_to_h")]
    assert_equals_peft(
        FrodConfig, "FrodConfig", tmp_path, on, fixed, sparse_rate=0.1, init_weights=False, progressbar=False
    )


def test_a_new_adapter_has_pefts_basis(tmp_path):
    model = get_peft_model(base(), FrodConfig(target_modules=TARGETS, projection_prng_key=3))
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.FrodConfig(target_modules=TARGETS, projection_prng_key=3, progressbar=False)
    peft.get_peft_model(base(), theirs).save_pretrained(tmp_path / "peft")
    ours, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == other.keys()
    for key, value in other.items():
        assert ours[key].dtype == value.dtype
        torch.testing.assert_close(ours[key], value)
    held = {id(m.adapters["default"].frod_V) for m in model.modules() if hasattr(m, "adapters")}
    assert len(held) == 3  # a basis for each kind of layer


@pytest.mark.parametrize("config", [FrodConfig(target_modules=TARGETS), PsoftConfig(r=3, target_modules=TARGETS)])
def test_what_was_derived_follows_weights_that_are_loaded(config):
    torch.manual_seed(13)
    other = base()
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    loaded, source = (copy.deepcopy(get_peft_model(each, config).eval()) for each in (base(), other))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    loaded.load_state_dict(source.state_dict())
    torch.testing.assert_close(loaded(TOKENS).logits, source(TOKENS).logits)
    assert not any(module._load_state_dict_post_hooks for module in loaded.unload().modules())


def test_kinds_and_blocks_are_named_as_in_peft():
    assert [kind_of(p) for p in ("a.layers.3.mlp.up", "h.0", "h.0.fc", "x.attention.output.dense")] == [
        "mlp_up",
        "h_0",
        "fc",
        "attention_output",
    ]
    assert [block_of(p, 7) for p in ("a.layers.3.mlp.up", "encoder.layer.11.q", "head")] == [3, 11, 7]


def test_dropout_zeroes_inputs_of_the_change():
    assert_drops_inputs(FrodConfig(target_modules=["0"], frod_dropout=0.375, init_weights=False))


def test_what_it_refuses(tmp_path):
    with pytest.raises(ConfigError) as caught:
        FrodConfig(sparse_rate=2.0, regularization_alpha=0.0, projection_prng_key=2**64, save_projection=False,
                   frod_dropout=1.0)  # fmt: skip
    for words in ("sparse_rate=2.0 must lie in", "regularization_alpha=0.0 must be above 0", "must be a seed",
                  "save_projection=False is not supported", "frod_dropout=1.0 must lie in [0, 1)"):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="FRoD at q_proj needs the frozen weight"):
        FrodConfig().derived(site("q_proj", 7, 5), {})
    two = base()
    two.model.layers[1].self_attn.q_proj = torch.nn.Linear(20, 24)
    with pytest.raises(TargetError, match=r"layers.1.*q_proj has 20 inputs, and .*layers.0.*q_proj has 24: layers"):
        get_peft_model(two, FrodConfig(target_modules=["q_proj"]))
    get_peft_model(base(), FrodConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.frod_s_indices.self_attn_q_proj"][0, 0] = 24
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"frod_s_indices of .*q_proj lie outside a matrix of 24 x 24"):
        PeftModel.from_pretrained(base(), tmp_path)
