"""MiSS against sums of blocks and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import TARGETS, assert_drops_inputs, assert_equals_peft, base, every_base, site
from veneer import MissConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"r": 4}


@pytest.mark.parametrize(("fields", "columns"), [({}, 6), ({"init_weights": "mini", "mini_r": 3}, 3)])
def test_blocks_of_the_inputs_are_added_up(fields, columns):
    block = torch.randn(4, columns, dtype=torch.float64)
    w, x = torch.randn(6, 11, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    record = MissConfig(r=4, **fields).lower(site("q_proj", 6, 11), {"miss_block": block})
    sums = x[:4] + x[4:8] + torch.cat([x[8:], torch.zeros(1)])
    update = torch.tensor([sums @ block[:, o % columns] for o in range(6)], dtype=torch.float64)
    torch.testing.assert_close(fold_linear(record, w)[0] @ x, w @ x + update)


def test_bat_multiplies_blocks_of_the_weight():
    w, m = torch.randn(6, 9, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    config = MissConfig(r=3, init_weights="bat")
    record = config.lower(replace(site("q_proj", 6, 9), weight=DenseWeight(w)), {"miss_block": m})
    expected = torch.empty_like(w)
    for k in range(2):
        for j in range(3):
            rows, columns = slice(3 * k, 3 * k + 3), slice(3 * j, 3 * j + 3)
            expected[rows, columns] = w[rows, columns] + (w[rows, columns] + torch.eye(3)) @ m[k]
    torch.testing.assert_close(fold_linear(record, w)[0], expected)


@every_base
@pytest.mark.parametrize(
    "fields",
    [{"init_weights": False, "r": 7}, {"init_weights": "mini", "r": 3, "mini_r": 4}, {"init_weights": "bat", "r": 2}],
    ids=str,
)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(MissConfig, "MissConfig", tmp_path, on, moved=True, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"mini_r": 0}, "mini_r=0 must be a whole number of at least 1"),
        ({"miss_dropout": 1.0}, "miss_dropout=1.0 must lie in [0, 1)"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        MissConfig(**fields)
    assert words in str(caught.value)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(TargetError, match=r"r=64 is above the 24 inputs of .*q_proj: give r=24 or less"):
        get_peft_model(base(), MissConfig(target_modules=TARGETS))
    with pytest.raises(TargetError, match=r"mini_r=5 does not divide the 24 outputs of .*: give a divisor of 24"):
        get_peft_model(base(), MissConfig(r=3, mini_r=5, init_weights="mini", target_modules=TARGETS))
    with pytest.raises(TargetError, match=r"r=5 does not divide the 24 inputs and 24 outputs .* divisor of 24"):
        get_peft_model(base(), MissConfig(r=5, init_weights="bat", target_modules=TARGETS))


def test_bat_needs_the_weight():
    with pytest.raises(ConfigError, match="MiSS with init_weights='bat' at q_proj needs the frozen weight"):
        MissConfig(r=3, init_weights="bat").lower(site("q_proj", 6, 9), {"miss_block": torch.zeros(2, 3, 3)})


def test_dropout_zeroes_inputs_of_the_update():
    torch.manual_seed(3)
    config = MissConfig(r=1, miss_dropout=0.375, init_weights=False, target_modules=["0"])
    assert_drops_inputs(config)
