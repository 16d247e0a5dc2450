"""Factors of LoRA in blocks (BD-LoRA) and of pooled inputs (QA-LoRA), against closed forms and PEFT."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import nn

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, near, site
from veneer import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear, fold_linear

BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}


def test_blocks_are_on_the_diagonal():
    config = LoraConfig(r=4, lora_alpha=6, use_bdlora=BLOCKS)
    assert config.use_bdlora == BdLoraConfig(**BLOCKS)
    w, a, b = torch.randn(8, 6), torch.randn(4, 3), torch.randn(8, 4)
    record = config.lower(site("mlp.down_proj", 8, 6), {"lora_A": a, "lora_B": b})
    torch.testing.assert_close(fold_linear(record, w)[0], w + 1.5 * b @ torch.block_diag(a[:2], a[2:]))
    a, b = torch.randn(4, 6), torch.randn(8, 2)
    record = config.lower(site("self_attn.q_proj", 8, 6), {"lora_A": a, "lora_B": b})
    torch.testing.assert_close(fold_linear(record, w)[0], w + 1.5 * torch.block_diag(b[:4], b[4:]) @ a)


def test_blocks_equal_peft(tmp_path):
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 7, "use_bdlora": peft.BdLoraConfig(**BLOCKS)}
    assert_equals_peft(LoraConfig, "LoraConfig", tmp_path, moved=True, **fields)


def test_a_reads_the_means_of_its_inputs():
    a, b, w = torch.randn(3, 4), torch.randn(5, 3), torch.randn(5, 8)
    factors = {"lora_A": {"x": SimpleNamespace(weight=a)}, "lora_B": {"x": SimpleNamespace(weight=b)}}
    rest = {"lora_dropout": {"x": nn.Identity()}, "scaling": {"x": 2.0}, "qalora_group_size": {"x": 2}}
    module, x = SimpleNamespace(**factors, **rest, in_features=8, training=False), torch.randn(2, 7, 8)
    record = LoraConfig(r=3, lora_alpha=6, use_qalora=True, qalora_group_size=2).lower(
        site("q_proj", 5, 8), {"lora_A": a, "lora_B": b}
    )
    found = apply_linear(record, x, DenseWeight(w))
    torch.testing.assert_close(found, QALoraLinearVariant.forward(module, "x", x, x @ w.T))


def test_factors_of_pooled_inputs_are_saved_small(tmp_path):
    config = LoraConfig(r=3, use_qalora=True, qalora_group_size=4, init_lora_weights=False, target_modules=TARGETS)
    model = get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path)
    shapes = {key: x.shape for key, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {shape for key, shape in shapes.items() if "lora_A" in key} == {(3, 6), (3, 10)}
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    logits = model(TOKENS).logits.detach()
    assert torch.equal(loaded(TOKENS).logits, logits)
    assert (base()(TOKENS).logits - logits).norm() > 1e-3 * logits.norm()
    near(loaded.merge_and_unload()(TOKENS).logits.detach(), logits)


def test_what_they_refuse():
    own = LoraConfig(r=4, target_modules=TARGETS, use_bdlora=BLOCKS)
    with pytest.raises(ConfigError) as told:
        replace(own, use_dora=True, init_lora_weights="pissa")
    for option in ("init_lora_weights='pissa'", "use_dora=True"):
        assert f"{option} does not go with use_bdlora" in str(told.value)
    with pytest.raises(ConfigError, match="use_qalora=True does not go with use_bdlora: leave it out"):
        replace(own, use_qalora=True)
    with pytest.raises(ConfigError, match="qalora_group_size=0 must be a whole number of at least 1"):
        LoraConfig(qalora_group_size=0)
    with pytest.raises(ConfigError, match=r"BdLoraConfig: unknown keys \['n'\]"):
        LoraConfig(use_bdlora={"n": 2})
    with pytest.raises(ConfigError, match=r"nblocks=0 must be .*bd_a and target_modules_bd_b share \['q'\]"):
        BdLoraConfig(target_modules_bd_a=["q"], target_modules_bd_b=["q"], nblocks=0)
    with pytest.raises(TargetError) as caught:
        get_peft_model(base(), replace(own, use_bdlora=BdLoraConfig(["down"], ["q_proj", "own_p"], 3)))
    for words in ("q_proj: nblocks=3 does not divide r=4 and the 24 outputs of B: give a divisor of 4",
                  "v_proj: neither target_modules_bd_a nor target_modules_bd_b names it. Set match_strict=False",
                  "down_proj: its name is in target_modules_bd_a and target_modules_bd_b"):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(TargetError, match=r"qalora_group_size=16 at .*q_proj: give a divisor of its 24 inputs"):
        get_peft_model(base(), LoraConfig(use_qalora=True, target_modules=TARGETS))
