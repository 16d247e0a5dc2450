"""KaSA against its singular triplets in closed form and PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, near, site
from veneer import KasaConfig, LoraConfig, get_peft_model, save_as_lora
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear


def test_the_least_triplets_are_taken_off():
    w, a, b, d = (torch.randn(*size) for size in ((7, 5), (2, 5), (7, 2), (2,)))
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w))
    config = LoraConfig(r=2, lora_alpha=3, kasa_config={"beta": 0.5})
    assert config.kasa_config == KasaConfig(beta=0.5)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3] + 1.5 * b @ torch.diag(d) @ a
    record = config.lower(place, {"lora_A": a, "lora_B": b, "lora_diag": d})
    torch.testing.assert_close(fold_linear(record, w)[0], expected)
    assert config.largest_rank == record.rank == 4


def test_it_equals_peft(tmp_path):
    fields: dict[str, Any] = {"r": 3, "lora_alpha": 7, "rank_pattern": {"v_proj": 2}, "kasa_config": peft.KasaConfig()}
    assert_equals_peft(LoraConfig, "LoraConfig", tmp_path, moved=True, **fields)


def test_a_training_step_adds_pefts_terms_to_the_loss():
    torch.manual_seed(5)
    settings = {"r": 3, "target_modules": TARGETS, "init_lora_weights": False}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings, kasa_config=peft.KasaConfig(0.3, 0.7)))
    config = LoraConfig(**settings, kasa_config=KasaConfig(0.3, 0.7))
    factors = {name: p.detach() for name, p in theirs.named_parameters() if "lora_" in name}
    names = sorted({name.partition(".lora_")[0] for name in factors})
    ends = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "lora_diag": "lora_diag.default"}
    layers = [{own: factors[f"{name}.{end}"] for own, end in ends.items()} for name in names]
    near(config.training.penalty(layers), theirs.base_model._get_kasa_loss().detach())
    assert replace(config, kasa_config=KasaConfig(0.0, 0.0)).training.penalty(layers) is None


def test_it_is_plain_lora_of_twice_the_rank(tmp_path):
    config = LoraConfig(r=2, target_modules=TARGETS, kasa_config=KasaConfig(), init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    written = save_as_lora(tmp_path, model, rank=4)
    assert written.error < 1e-6
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()(TOKENS).logits
        near(theirs, model(TOKENS).logits)


def test_what_it_refuses():
    own = LoraConfig(r=3, target_modules=TARGETS, kasa_config=KasaConfig())
    with pytest.raises(ConfigError, match=r"use_dora=True does not go with kasa_config.*lora_dropout=0.1 does not go"):
        replace(own, use_dora=True, lora_dropout=0.1)
    with pytest.raises(ConfigError, match=r"kasa_config=KasaConfig.* does not go with use_qalora: leave it out"):
        replace(own, use_qalora=True)
    with pytest.raises(ConfigError, match=r"beta=-1.0 must be at least 0; gamma=-2.0 must be"):
        KasaConfig(beta=-1.0, gamma=-2.0)
    with pytest.raises(TargetError, match=r"r=12 at .*v_proj takes off every singular triplet .*give at most 11"):
        get_peft_model(base(), replace(own, r=12))
    with pytest.raises(ConfigError, match="KaSA at q_proj needs the frozen weight"):
        own.derived(site("q_proj", 7, 5), {})
