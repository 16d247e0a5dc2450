"""IA3 against the paper's formulas, and which layers scale their input."""

import json
from collections import OrderedDict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import get_peft_model
from veneer.errors import ConfigError
from veneer.methods.ia3 import IA3Config
from veneer.model.sites.places import placed_on
from veneer.records.linear import fold_linear
from veneer.records.sites import LinearSite
from veneer.store.adapter.config import read_config
from veneer.store.adapter.records import read_records

W, C = torch.linspace(-1, 1, 35).reshape(7, 5), torch.linspace(0.5, 2, 7)


def site(name: str, bias: torch.Tensor | None = C) -> LinearSite:
    return LinearSite(name=name, in_features=5, out_features=7, bias=bias)


def test_an_output_is_scaled_with_its_bias():
    vector = torch.linspace(0.5, 1.7, 7)
    record = IA3Config().lower(site("layers.0.k_proj"), {"ia3_l": vector[:, None]})
    weight, bias = fold_linear(record, W, C)
    torch.testing.assert_close(weight, vector[:, None] * W)
    torch.testing.assert_close(bias, vector * C)


def test_an_input_is_scaled_before_the_bias():
    vector = torch.linspace(0.5, 1.7, 5)
    config = IA3Config(feedforward_modules=["down_proj"])
    record = config.lower(site("layers.0.mlp.down_proj"), {"ia3_l": vector[None]})
    weight, bias = fold_linear(record, W, C)
    torch.testing.assert_close(weight, W * vector)
    assert bias is C


@pytest.mark.parametrize(
    ("config", "name", "scales_input"),
    [
        (IA3Config(), "layers.0.mlp.down_proj", False),
        (IA3Config(feedforward_modules=["mlp.c_proj"]), "h.0.mlp.c_proj", True),
        (IA3Config(feedforward_modules=["mlp.c_proj"]), "h.0.attn.c_proj", False),
        (IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]), "layers.0.fc1", True),
        (IA3Config(target_modules=["fc2"], feedforward_modules=[]), "layers.0.fc2", False),
        (IA3Config(feedforward_modules=r".*\.fc\d"), "layers.0.fc3", True),
    ],
)
def test_which_layers_scale_their_input(config, name, scales_input):
    assert config.shapes(site(name)) == {"ia3_l": (1, 5) if scales_input else (7, 1)}


def test_a_start_away_from_one_is_random():
    start = IA3Config(init_ia3_weights=False).init(site("k_proj"), torch.Generator().manual_seed(2))["ia3_l"]
    assert start.std() > 0.3


def test_feedforward_modules_must_be_targets():
    with pytest.raises(
        ConfigError, match=r"feedforward_modules \['down_proj'\] are not among target_modules \['k_proj'\]"
    ):
        IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"])


def test_a_file_that_does_not_name_the_feedforward_modules_tells_them_by_its_vectors(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 41, "num_attention_heads": 2, "num_key_value_heads": 1}
    make = partial(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2, vocab_size=50, **sizes))
    model = get_peft_model(make(), IA3Config(init_ia3_weights=False))
    model.save_pretrained(tmp_path)
    expected = read_records(tmp_path, placed_on(make(), read_config(tmp_path)))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["feedforward_modules"] == ["down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "feedforward_modules": None}))
    found = read_records(tmp_path, placed_on(make(), read_config(tmp_path)))
    assert sum(record.input is not None for record in found.records.values()) == 2
    for path, record in expected.records.items():
        for name in ("input_scale", "output_scale"):
            one, other = getattr(record, name), getattr(found.records[path], name)
            assert (one is None and other is None) or torch.equal(one, other)


def test_a_convolution_scales_its_outputs_where_a_file_does_not_name_the_feedforward_modules(tmp_path):
    def net() -> nn.Module:
        return nn.Sequential(OrderedDict(same=nn.Conv2d(7, 7, 3), other=nn.Conv2d(7, 5, 3)))

    model = get_peft_model(net(), IA3Config(target_modules=["same", "other"], init_ia3_weights=False))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "feedforward_modules": None}))
    found = read_records(tmp_path, placed_on(net(), read_config(tmp_path))).records
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("same", "other"):
        assert found[name].input is None
        assert torch.equal(found[name].output_scale, saved[f"base_model.model.{name}.ia3_l"].flatten())
