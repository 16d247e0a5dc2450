"""Uni-LoRA against look-ups in one vector and PEFT."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import PeftModel, UniLoraConfig, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.methods.unilora import balanced

SETTINGS = {"theta_d_length": 53, "init_theta_d_bound": 1.0}
FIXED = [f"unilora_{what}_{factor}" for what in ("indices", "scales") for factor in "AB"]


def test_entries_are_numbers_of_one_vector():
    config, theta = UniLoraConfig(r=2, theta_d_length=5, proj_seed=3), torch.randn(5)
    record = config.lower(site("q_proj", 7, 4), {"unilora_theta_d": theta})
    index = balanced(3, 5, 2 * (7 + 4))
    assert sorted(index.bincount().tolist()) == [4, 4, 4, 5, 5]
    entries = theta[index] / index.bincount()[index].sqrt()
    torch.testing.assert_close(record.low_rank.a, entries[:8].view(2, 4))
    torch.testing.assert_close(record.low_rank.b, entries[8:].view(7, 2))


@every_base
@pytest.mark.parametrize("fields", [{}, {"save_indices": True, "init_weights": False, "proj_seed": 5}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    fields = {"r": 3, "theta_d_length": 19, "init_theta_d_bound": 3.0, **fields}
    assert_equals_peft(UniLoraConfig, "UniLoraConfig", tmp_path, on, FIXED, **fields)


def test_numbers_that_nothing_takes_have_no_gradient():
    config = UniLoraConfig(r=1, theta_d_length=30)
    theta = torch.randn(30, requires_grad=True)
    record = config.lower(site("q_proj", 7, 4), {"unilora_theta_d": theta})
    (gradient,) = torch.autograd.grad(record.added().square().sum(), theta)
    assert gradient.isfinite().all()
    assert (gradient != 0).sum() == 11


def test_indices_of_a_file_lie_in_the_vector(tmp_path):
    config = UniLoraConfig(r=2, theta_d_length=5, save_indices=True, target_modules=TARGETS)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(x for key, x in tensors.items() if key.endswith("indices_A"))[0, 0] = 5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"unilora_indices_A of .*_proj holds indices outside .* in 0 to 4"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_what_it_refuses():
    with pytest.raises(ConfigError) as caught:
        UniLoraConfig(r=0, theta_d_length=0, proj_seed=-1, unilora_dropout=1.0, init_theta_d_bound=0.0)
    for words in ("r=0 must be", "theta_d_length=0 must be", "proj_seed=-1 must be", "unilora_dropout=1.0 must lie",
                  "init_theta_d_bound=0.0 must be"):  # fmt: skip
        assert words in str(caught.value)
