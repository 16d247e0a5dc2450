"""Trainable tokens against PEFT: files both ways, logits and gradients, also on a tied head."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from methods_in_peft import TOKENS, base, near
from veneer import TrainableTokensConfig, get_peft_model
from veneer.errors import ConfigError, TargetError

INDICES = [8, 61, 3]  # the last occurs in no text
KEY = "base_model.model.model.embed_tokens.trainable_tokens_delta"


def tied() -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 71}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.parametrize("make", [base, tied], ids=["apart", "tied"])
def test_it_equals_peft(make, tmp_path):
    torch.manual_seed(11)
    reference = peft.get_peft_model(make(), peft.TrainableTokensConfig(token_indices=INDICES)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    reference.save_pretrained(tmp_path / "peft")
    model = veneer.PeftModel.from_pretrained(make(), tmp_path / "peft", is_trainable=True)
    assert type(model.peft_config["default"]) is TrainableTokensConfig
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert torch.equal(written[KEY], read[KEY])
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    losses = [each.eval()(TOKENS, labels=TOKENS) for each in (model, again)]
    assert (make()(TOKENS).logits - losses[1].logits).norm() > 1e-2 * losses[1].logits.norm()
    near(losses[0].logits, losses[1].logits)
    grads = []
    for each, found in zip((model, again), losses, strict=True):
        found.loss.backward()
        grads.append([p.grad for p in each.parameters() if p.grad is not None])
    assert len(grads[0]) == 1
    near(grads[0][0], sum(grads[1]))
    near(model.merge_and_unload()(TOKENS).logits, losses[1].logits)


def test_only_the_rows_are_written(tmp_path):
    model = get_peft_model(base(), TrainableTokensConfig(token_indices=INDICES))
    assert model.get_nb_trainable_parameters()[0] == 3 * 24
    model.save_pretrained(tmp_path)
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        KEY: (3, 24)
    }


def test_a_table_by_name():
    model = get_peft_model(base(), TrainableTokensConfig(token_indices=[5], target_modules=["lm_head"]))
    rows = [name for name, p in model.named_parameters() if p.requires_grad]
    assert rows == ["lm_head.copies.default.token_adapter.trainable_tokens_delta"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows_start_as_in_peft(dtype):
    fields = {"token_indices": INDICES, "init_weights": False}
    found, plain = [], base().to(dtype).model.embed_tokens.weight
    for library in (veneer, peft):
        torch.manual_seed(13)
        model = library.get_peft_model(base().to(dtype), library.TrainableTokensConfig(**fields)).eval()
        (rows,) = (p.detach() for p in model.parameters() if p.requires_grad)
        found.append(rows.to(dtype))
        with model.disable_adapter():
            apart = model(TOKENS).logits
        assert (model(TOKENS).logits - apart).norm() > 1e-2 * apart.norm()
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model.get_input_embeddings().weight[:71], plain)
    assert found[0].shape == (3, 24)
    if dtype == torch.float32:
        assert torch.equal(*found)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="token_indices is empty: name the rows to train"):
        TrainableTokensConfig()
    with pytest.raises(ConfigError, match=r"token_indices=\[3, 3, -1\] must be different numbers of at least 0"):
        TrainableTokensConfig(token_indices=[3, 3, -1])
    with pytest.raises(TargetError, match=r"holds \[71\] for 'model.embed_tokens', which has rows 0 to 70"):
        get_peft_model(base(), TrainableTokensConfig(token_indices=[71]))
