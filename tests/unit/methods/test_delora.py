"""DeLoRA against normalized factors and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import assert_drops_inputs, assert_equals_peft, every_base, site
from veneer import DeloraConfig
from veneer.errors import ConfigError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"delora_lambda": 2.0}


def test_the_norm_of_the_update_is_lambda_times_that_of_the_weight_at_most():
    w = torch.randn(7, 5)
    place, config = replace(site("q_proj", 7, 5), weight=DenseWeight(w)), DeloraConfig(r=3, init_weights=False)
    params = {name: value.double() for name, value in config.init(place).items()}
    torch.testing.assert_close(params["delora_w_norm"].float(), w.square().sum(0).sqrt())
    a, b, norms = params["delora_A"], params["delora_B"], params["delora_w_norm"]
    expected = sum(torch.outer(b[:, j] / b[:, j].norm(), a[j] / a[j].norm()) for j in range(3)) * 15 / 3 * norms
    folded, _ = fold_linear(config.lower(place, params), w.double())
    torch.testing.assert_close(folded - w.double(), expected)


@every_base
def test_it_equals_peft(on, tmp_path):
    name = {"llama": "v_proj", "neox": "dense_4h_to_h"}[on]
    fields = {"r": 3, "delora_lambda": 6, "rank_pattern": {name: 5}, "lambda_pattern": {name: 9}}
    assert_equals_peft(DeloraConfig, "DeloraConfig", tmp_path, on, ["delora_w_norm"], init_weights=False, **fields)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        DeloraConfig(r=0)
    with pytest.raises(ConfigError, match=r"module_dropout=1.0 must lie in \[0, 1\)"):
        DeloraConfig(module_dropout=1.0)


def test_dropout_zeroes_inputs_of_a():
    assert_drops_inputs(DeloraConfig(r=3, target_modules=["0"], module_dropout=0.375, init_weights=False))
