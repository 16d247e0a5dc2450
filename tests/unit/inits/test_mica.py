"""MiCA against the singular vectors of the weight and PEFT: A is trained alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import LoraConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.inits import find_start
from veneer.quant.dense import DenseWeight


def test_b_holds_the_directions_that_the_weight_uses_least():
    w = torch.randn(7, 5)
    a, b = find_start("mica").factors(replace(site("q_proj", 7, 5), weight=DenseWeight(w)), 2, 1.0, None)
    assert torch.equal(a, torch.zeros(2, 5))
    torch.testing.assert_close(b.T @ b, torch.eye(2))
    torch.testing.assert_close((b.T @ w).norm(dim=1), torch.linalg.svdvals(w)[-2:])


@every_base
def test_it_equals_peft(on, tmp_path):
    fields = {"r": 3, "lora_alpha": 5, "init_lora_weights": "mica"}
    assert_equals_peft(LoraConfig, "LoraConfig", tmp_path, on, ["lora_B.weight"], moved=True, **fields)


def test_dora_is_refused_beside_it():
    with pytest.raises(ConfigError, match="init_lora_weights='mica' and use_dora exclude each other, as in PEFT"):
        LoraConfig(init_lora_weights="mica", use_dora=True)


def test_only_a_is_trained():
    model = get_peft_model(base(), LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="mica"))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A"}
