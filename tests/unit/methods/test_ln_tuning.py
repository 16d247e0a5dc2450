"""LN tuning against PEFT: files both ways, logits and gradients, default targets."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as LISTED
from safetensors.torch import load_file

import veneer
from methods_in_peft import TOKENS, base, near, neox
from veneer import LNTuningConfig, get_peft_model
from veneer.contract.places import modules_in
from veneer.errors import TargetError
from veneer.model.sites.places import placed_on
from veneer.store.adapter.config import read_config
from veneer.store.adapter.records import read_records

OF_NEOX = {"target_modules": ["input_layernorm", "final_layer_norm"]}


def gradients(model: Any, wrapper: str) -> dict[str, torch.Tensor]:
    """By the place of each parameter."""
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    named = ((name.replace("base_model.model.", "", 1), p) for name, p in model.named_parameters())
    return {name.replace(f".{wrapper}.default.", "."): p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize(("make", "fields"), [(base, {}), (neox, OF_NEOX)], ids=["llama", "neox"])
def test_it_equals_peft(make, fields, tmp_path):
    torch.manual_seed(11)
    reference = peft.get_peft_model(make(), peft.LNTuningConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    reference.save_pretrained(tmp_path / "peft")
    model = veneer.PeftModel.from_pretrained(make(), tmp_path / "peft", is_trainable=True)
    assert type(model.peft_config["default"]) is LNTuningConfig
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert written.keys() == read.keys()
    assert all(torch.equal(read[key], value) for key, value in written.items())
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    wanted = again(TOKENS).logits
    assert (make()(TOKENS).logits - wanted).norm() > 1e-2 * wanted.norm()
    near(model.eval()(TOKENS).logits, wanted)
    ours, theirs = gradients(model, "copies"), gradients(again, "ln_tuning_layers")
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        near(ours[name], gradient)
    near(model.merge_and_unload()(TOKENS).logits, wanted)


def test_modules_to_save_keep_their_own_keys(tmp_path):
    config = {"target_modules": ["norm"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(base(), LNTuningConfig(**config))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {"base_model.model.model.norm.ln_tuning_layers.weight", "base_model.model.lm_head.weight"}
    assert modules_in(read_config(tmp_path), keys) == ["lm_head", "model.norm"]
    stored = read_records(tmp_path, placed_on(base(), read_config(tmp_path)))
    assert (stored.records, len(stored.others)) == ({}, 2)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    near(theirs(TOKENS).logits, model(TOKENS).logits)


def test_default_targets_are_pefts():
    for model_type, names in LISTED.items():
        assert set(LNTuningConfig.fields_for(model_type)["target_modules"]) == set(names), model_type


def test_what_it_refuses():
    with pytest.raises(TargetError, match=r"target module 'nrom' matches no module .*\(nearest: norm"):
        get_peft_model(base(), LNTuningConfig(target_modules=["nrom"]))
    with pytest.raises(TargetError, match=r"no default target_modules for this model.* Modules with weights of this"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 5)), LNTuningConfig())
