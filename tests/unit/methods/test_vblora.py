"""VB-LoRA against mixtures of vectors and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, every_base, site
from veneer import PeftModel, VBLoRAConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.store.adapter.records import read_records

SETTINGS = {
    "num_vectors": 3,
    "vector_length": 2,
    "topk": 3,
    "r": 1,
    "init_vector_bank_bound": 0.5,
}  # every logit counts
FIELDS = {"r": 3, "num_vectors": 7, "vector_length": 4, "init_vector_bank_bound": 2.0, "init_logits_std": 1.5}
BANK = "base_model.vblora_vector_bank"


def test_factors_are_mixtures_of_the_vectors_with_the_largest_logits():
    config = VBLoRAConfig(r=1, num_vectors=3, vector_length=2, topk=2)
    bank = torch.tensor([[1.0, 2.0], [10.0, 20.0], [-3.0, 7.0]])
    near, far = torch.tensor([0.0, 1.0, -9.0]), torch.tensor([2.0, -9.0, 2.0])
    params = {"vblora_logits_A": torch.stack([near, far])[None], "vblora_logits_B": near[None, None]}
    record = config.lower(site("q_proj", 2, 4), params | {"vblora_vector_bank": bank})
    mixed = (bank[0] + torch.e * bank[1]) / (1 + torch.e)
    torch.testing.assert_close(record.low_rank.a, torch.cat([mixed, torch.tensor([-1.0, 4.5])])[None])
    torch.testing.assert_close(record.low_rank.b, mixed[:, None])


@every_base
@pytest.mark.parametrize("fields", [{}, {"topk": 4}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(VBLoRAConfig, "VBLoRAConfig", tmp_path, on, **FIELDS, **fields)


def test_the_bank_is_one_parameter_with_one_gradient_and_one_state():
    model = get_peft_model(base(), VBLoRAConfig(target_modules=TARGETS, **FIELDS))
    banks = [p for name, p in model.named_parameters() if name.endswith("vector_bank")]
    held = {id(m.adapters["default"]["vblora_vector_bank"]) for m in model.modules() if hasattr(m, "adapters")}
    assert held == {id(bank) for bank in banks}
    assert len(held) == 1
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(TOKENS, labels=TOKENS).loss.backward()
    before = banks[0].detach().clone()
    optimizer.step()
    assert banks[0] in optimizer.state
    assert not torch.equal(before, banks[0])
    assert model.get_nb_trainable_parameters()[0] == 7 * 4 + sum(
        7 * 3 * (m.in_features + m.out_features) // 4 for m in model.modules() if hasattr(m, "adapters")
    )


def test_records_from_the_file_have_the_bank(tmp_path):
    model = get_peft_model(base(), VBLoRAConfig(target_modules=TARGETS, **FIELDS))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in written if "bank" in key] == [BANK]
    stored = read_records(tmp_path)
    assert len(stored.records) == 6
    assert stored.others == ()
    for path, record in stored.updates.items():
        own = model.get_submodule(path).record("default").low_rank
        assert torch.equal(record.low_rank.a, own.a)
        assert torch.equal(record.low_rank.b, own.b)


def test_two_adapters_have_banks_of_their_own(tmp_path):
    model = get_peft_model(base(), VBLoRAConfig(target_modules=TARGETS, **FIELDS))
    model.add_adapter("b", VBLoRAConfig(target_modules=TARGETS, **FIELDS))
    banks = [p for name, p in model.named_parameters() if name.endswith("vector_bank")]
    assert len(banks) == 2
    assert not torch.equal(*banks)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path / "b")
    assert torch.equal(next(p for name, p in again.named_parameters() if name.endswith("vector_bank")), banks[1])


def test_what_it_refuses():
    own = VBLoRAConfig(target_modules=TARGETS, **FIELDS)
    with pytest.raises(TargetError, match=r"vector_length=5 does not divide the 24 inputs and 24 outputs .*of 24"):
        get_peft_model(base(), replace(own, vector_length=5))
    with pytest.raises(ConfigError, match="topk=8 is above num_vectors=7: give at most that many"):
        replace(own, topk=8)
    with pytest.raises(ConfigError, match=r"save_only_topk_weights=True is not supported: save .* with False"):
        replace(own, save_only_topk_weights=True)
    with pytest.raises(ConfigError, match=r"r=0 must .*vblora_dropout=1.0 must lie in.*init_logits_std=-1.0 must be"):
        replace(own, r=0, vblora_dropout=1.0, init_logits_std=-1.0)
