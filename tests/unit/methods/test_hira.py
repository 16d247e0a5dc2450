"""HiRA against the entrywise product and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods_in_peft import assert_convolutions_equal_peft, assert_drops_inputs, assert_equals_peft, every_base, site
from veneer import HiraConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"r": 20, "target_modules": "all-linear"}  # the change of small weights is small


def test_the_weight_is_multiplied_entry_by_entry():
    w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (3, 5), (7, 3)))
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w))
    record = HiraConfig(r=3).lower(place, {"hira_A": a, "hira_B": b})
    torch.testing.assert_close(fold_linear(record, w)[0], w * (1 + b @ a))


@every_base
def test_it_equals_peft(on, tmp_path):
    assert_equals_peft(HiraConfig, "HiraConfig", tmp_path, on, r=5, init_weights=False)


def test_embeddings_equal_peft(tmp_path):
    assert_equals_peft(HiraConfig, "HiraConfig", tmp_path, "table", ["base_layer.weight"], r=3, init_weights=False)


def test_convolutions_equal_peft(tmp_path):
    assert_convolutions_equal_peft("HiraConfig", tmp_path, r=3, init_weights=False)


@pytest.mark.parametrize("names", [[], ["default"] * 67], ids=["all", "by rows"])
def test_dropout_zeroes_inputs_of_the_change(names):
    config = HiraConfig(r=3, target_modules=["0"], hira_dropout=0.375, init_weights=False)
    assert_drops_inputs(config, names=names)
    assert_drops_inputs(config, nn.Conv1d(67, 7, 1), names)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_a_start_is_the_base(start):
    for kind, shape in (("linear", (7, 5)), ("embedding", (7, 5))):
        w = torch.randn(shape)
        place = replace(site("q_proj", *shape), kind=kind, weight=DenseWeight(w))
        config = HiraConfig(r=3, init_weights=start)
        params = config.init(place)
        assert any(value.abs().max() > 0 for value in params.values())
        assert torch.equal(fold_linear(config.lower(place, params), w)[0], w)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        HiraConfig(r=0)
    with pytest.raises(ConfigError, match=r"hira_dropout=1.0 must lie in \[0, 1\)"):
        HiraConfig(hira_dropout=1.0)
    with pytest.raises(ConfigError, match="HiRA at q_proj needs the frozen weight"):
        HiraConfig(r=2).lower(site("q_proj", 7, 5), {"hira_A": torch.ones(2, 5), "hira_B": torch.ones(7, 2)})
    with pytest.raises(TargetError, match="0 is a convolution in 2 groups, which this method cannot change"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), HiraConfig(target_modules=["0"]))
