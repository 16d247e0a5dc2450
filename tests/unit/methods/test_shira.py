"""SHiRA against a matrix of few entries and PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask
from safetensors.torch import load_file, save_file
from torch import nn

from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import PeftModel, ShiraConfig, get_peft_model
from veneer.errors import ConfigError, FormatError, TargetError
from veneer.model.sites.places import placed_on
from veneer.records.linear import fold_linear
from veneer.store.adapter.config import read_config
from veneer.store.adapter.records import read_records

SETTINGS = {"r": 2}


def test_few_weights_are_changed():
    config, place = ShiraConfig(r=2), site("q_proj", 7, 5)
    params = config.init(place)
    params["shira_weight"] = torch.randn(24, dtype=torch.float64)
    w = torch.randn(7, 5, dtype=torch.float64)
    expected = w.clone()
    for value, row, column in zip(params["shira_weight"], *params["shira_indices"].long(), strict=True):
        expected[row, column] += value
    assert (expected != w).sum() == 24
    assert torch.equal(fold_linear(config.lower(place, params), w)[0], expected)


def test_a_seed_draws_pefts_places():
    drawn = ShiraConfig(r=2, random_seed=13).init(site("q_proj", 7, 5))["shira_indices"]
    assert torch.equal(drawn.long(), torch.stack(torch.where(random_mask(nn.Linear(5, 7), 2, random_seed=13))))


@every_base
def test_it_equals_peft(on, tmp_path):
    fields = {"r": 2, "random_seed": 7, "init_weights": False}
    assert_equals_peft(ShiraConfig, "ShiraConfig", tmp_path, on, ["shira_indices"], **fields)


def test_places_outside_the_weight_are_refused(tmp_path):
    get_peft_model(base(), ShiraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("shira_indices"))
    tensors[key][1, 3] = 24
    save_file(tensors, file)
    words = "shira_indices of model.layers.0.self_attn.q_proj lie outside its 24 x 24 weights"
    with pytest.raises(FormatError, match=words):
        PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(FormatError, match=words):
        read_records(tmp_path, placed_on(base(), read_config(tmp_path)))
    tensors[key][:, 3] = tensors[key][:, 2]
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"shira_indices of .*q_proj name a weight twice: each may be listed once"):
        PeftModel.from_pretrained(base(), tmp_path)
    save_file(tensors | {key: tensors[key].to(torch.int16)}, file)
    with pytest.raises(
        FormatError, match="dtype int16, but an adapter's values must have one of int32, int64, float32"
    ):
        PeftModel.from_pretrained(base(), tmp_path)


def test_places_stay_whole_numbers_in_16_bits():
    model = get_peft_model(base(), ShiraConfig(r=2, target_modules=["q_proj"])).bfloat16()
    held = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert held.shira_indices.dtype == torch.int32
    assert held.shira_weight.dtype == torch.bfloat16


def test_what_it_refuses(tmp_path):
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        ShiraConfig(r=0)
    with pytest.raises(ConfigError, match=r"mask_type='mine' is not supported in training: use 'random'"):
        ShiraConfig(mask_type="mine")
    with pytest.raises(ConfigError, match="random_seed=1000000000000000000000 must be a seed of torch"):
        ShiraConfig(random_seed=10**21)
    with pytest.raises(TargetError, match=r"r=32 at .*q_proj trains 1536 numbers, .* 576 weights: give at most r=12"):
        get_peft_model(base(), ShiraConfig(target_modules=TARGETS))
    assert peft.ShiraConfig().r == ShiraConfig().r
