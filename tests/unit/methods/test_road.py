"""RoAd against matrices of pairs and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, assert_two_act_as_in_peft, base, every_base, site
from veneer import RoadConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.linear import fold_linear

SETTINGS = {"variant": "road_2", "group_size": 2}


def test_pairs_of_outputs_are_rotated_and_scaled():
    w, bias = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    theta, alpha = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    place = replace(site("q_proj", 8, 5), bias=bias)
    record = RoadConfig(group_size=4).lower(place, {"road_theta": theta, "road_alpha": alpha})
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    for k, (u, v) in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)]):
        c, s = alpha[k] * theta[k].cos(), alpha[k] * theta[k].sin()
        matrix[[u, v, u, v], [u, v, v, u]] = torch.stack([c, c, -s, s])
    folded, new_bias = fold_linear(record, w, bias)
    torch.testing.assert_close(folded, matrix @ w)
    torch.testing.assert_close(new_bias, matrix @ bias)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(record.output.transposed().apply(x), x @ matrix)


@every_base
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_it_equals_peft(variant, on, tmp_path):
    assert_equals_peft(RoadConfig, "RoadConfig", tmp_path, on, variant=variant, group_size=4, init_weights=False)


def test_two_adapters_act_as_in_peft(tmp_path):
    assert_two_act_as_in_peft("RoadConfig", tmp_path, init_weights=False, group_size=4, variant="road_4")


def test_what_it_refuses():
    for size in (0, 3):
        with pytest.raises(ConfigError, match=f"group_size={size} must be an even number of at least 2"):
            RoadConfig(group_size=size)
    with pytest.raises(ConfigError, match="variant='road_3'"):
        RoadConfig(variant="road_3")
    with pytest.raises(TargetError, match=r"group_size=64 does not divide the 24 outputs of .*an even divisor of 24"):
        get_peft_model(base(), RoadConfig(target_modules=TARGETS))
