"""LoHa against its paper's formula and PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods_in_peft import assert_convolutions_equal_peft, assert_equals_peft, site
from veneer import LoHaConfig, get_peft_model
from veneer.core.linear import fold_linear
from veneer.errors import ConfigError, TargetError

SETTINGS = {"r": 3, "alpha": 5.0}


def test_the_update_is_a_product_entry_by_entry():
    config = LoHaConfig(r=2, alpha=3.0, alpha_pattern={"q_proj": 7.0})
    place = site("model.q_proj", 7, 5)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in config.shapes(place).items()}
    w = torch.randn(7, 5, dtype=torch.float64)
    product = (params["hada_w1_a"] @ params["hada_w1_b"]) * (params["hada_w2_a"] @ params["hada_w2_b"])
    torch.testing.assert_close(fold_linear(config.lower(place, params), w)[0], w + 7 / 2 * product)


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 3}}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(LoHaConfig, "LoHaConfig", tmp_path, r=3, alpha=5, init_weights=False, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 must be"),
        ({"alpha_pattern": {"(": 2.0}}, "'(' is not a regular expression"),
        ({"rank_dropout": 0.1}, "rank_dropout=0.1 drops parts of the update in training"),
        ({"module_dropout": 0.2}, "module_dropout=0.2 drops parts of the update in training"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoHaConfig(**fields)
    assert words in str(caught.value)


def test_dropouts_of_a_trained_adapter_are_read():
    assert LoHaConfig(rank_dropout=0.1, inference_mode=True).rank_dropout == 0.1


def test_convolutions_equal_peft(tmp_path):
    assert_convolutions_equal_peft("LoHaConfig", tmp_path, r=3, alpha=5, init_weights=False)


def test_convolutions_in_groups_are_refused():
    with pytest.raises(TargetError, match="0 is a convolution in 2 groups, which this method cannot change"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), LoHaConfig(target_modules=["0"]))


def test_the_other_form_of_convolutions_is_refused():
    config = LoHaConfig(target_modules=["0"], use_effective_conv2d=True)
    with pytest.raises(TargetError, match="use_effective_conv2d=True is not supported at 0, a convolution"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), config)
