"""Cartridge against prefix tuning, whose file it has, and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from methods_in_peft import TOKENS, base, near
from veneer import CartridgeConfig, PeftModel, get_peft_model, initialize_kv_prefix_from_past_key_values
from veneer.errors import ConfigError
from veneer.model.attach.attach import live_parameters, stored_tensors

N, FIRST = 5, 2
FIELDS: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}


def theirs(folder: Path, n_frozen: int = FIRST) -> nn.Module:
    """PEFT's model, which was saved. PEFT trains no prompt that it has loaded."""
    torch.manual_seed(3)
    model = peft.get_peft_model(base(), peft.CartridgeConfig(**FIELDS, num_frozen_tokens=n_frozen))
    model.save_pretrained(folder)
    return model


def losses(model: nn.Module) -> torch.Tensor:
    """Return the losses of five steps, whose optimizer also decays what it trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.3)
    found = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("n_frozen", [0, FIRST])
def test_it_equals_peft(n_frozen, tmp_path):
    reference = theirs(tmp_path / "peft", n_frozen)
    model = PeftModel.from_pretrained(base(), tmp_path / "peft", is_trainable=True)
    config = model.peft_config["default"]
    assert type(config) is CartridgeConfig
    assert config.num_frozen_tokens == n_frozen
    with torch.no_grad():
        near(model(TOKENS).logits, reference(TOKENS).logits)
    held = live_parameters(model, model.adapter_state, "default")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(N - n_frozen, 48)]
    first = {key: value.clone() for key, value in held.items() if "frozen" in key}
    near(losses(model), losses(reference))
    near(trained[0].detach(), next(p for p in reference.parameters() if p.requires_grad).detach())
    assert all(torch.equal(held[key], value) for key, value in first.items())
    assert len(first) == (n_frozen > 0)
    model.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert ours.keys() == again.keys() == {"prompt_embeddings"}
    near(ours["prompt_embeddings"], again["prompt_embeddings"])
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    used = PeftModel.from_pretrained(base(), tmp_path / "ours")
    with torch.no_grad():
        near(used(TOKENS).logits, loaded(TOKENS).logits)
    assert list(live_parameters(used, used.adapter_state, "default")) == ["prompt_embeddings"]


def test_a_text_gives_its_keys_and_values():
    """The prefix then acts as if the text stood in front."""
    model = get_peft_model(base(), CartridgeConfig(**FIELDS, num_frozen_tokens=FIRST)).eval()
    text = torch.tensor([[7, 12, 30, 2, 9, 55]])
    cache = base()(text, use_cache=True).past_key_values
    flat = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    with torch.no_grad():
        both = base()(torch.cat([text[:, :N].expand(2, -1), TOKENS], dim=1)).logits[:, N:]
        near(model(TOKENS).logits, both)
    near(stored_tensors(model, model.adapter_state, "default")["prompt_embeddings"], flat)


def test_gradient_checkpointing_changes_nothing():
    model = get_peft_model(base(), CartridgeConfig(**FIELDS, num_frozen_tokens=FIRST)).train()
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append(trained.grad.clone())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    near(found[1], found[0])


def test_cartridges_are_joined_as_in_peft(tmp_path):
    for name, n in (("a", 3), ("b", 4)):
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, num_frozen_tokens=n - 2)
        get_peft_model(base(), config).save_pretrained(tmp_path / name)
    both = [tmp_path / "a", tmp_path / "b"]
    veneer.compose_cartridge_adapters(both, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(both, output_path=tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    config = CartridgeConfig.from_pretrained(tmp_path / "ours")
    assert config == CartridgeConfig.from_pretrained(tmp_path / "peft")
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (7, 1)
    lora = get_peft_model(base(), veneer.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="lora is no cartridge, but LORA: leave it out"):
        veneer.compose_cartridge_adapters([*both, tmp_path / "lora"], output_path=tmp_path / "out")
    with pytest.raises(ConfigError, match="adapter_paths names 1 cartridges: give at least two"):
        veneer.compose_cartridge_adapters(both[:1], output_path=tmp_path / "out")
    fields = (tmp_path / "b" / "adapter_config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')
    (tmp_path / "b" / "adapter_config.json").write_text(fields)
    with pytest.raises(ConfigError, match="the cartridges differ in num_layers: give those of one base"):
        veneer.compose_cartridge_adapters(both, output_path=tmp_path / "out")


def test_files_that_do_not_hold_their_tokens_are_told_together(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        get_peft_model(base(), CartridgeConfig(**FIELDS)).save_pretrained(folder)
    tokens = load_file(folders[0] / "adapter_model.safetensors")["prompt_embeddings"]
    contents = [
        {"other": tokens},
        {"prompt_embeddings": tokens[:3].clone()},
        {"prompt_embeddings": tokens[:, :7].clone()},
    ]
    for folder, content in zip(folders, contents, strict=False):
        save_file(content, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError) as caught:
        veneer.compose_cartridge_adapters(folders, output_path=tmp_path / "out")
    told = str(caught.value)
    assert f"{folders[0]} holds no matrix prompt_embeddings: save it again" in told
    assert f"{folders[1]} holds 3 tokens, and its config tells of 5: save it again" in told
    assert "the cartridges differ in width [7, 48]: give those of one base" in told
    assert told.count("save it again") == 2
    assert not (tmp_path / "out").exists()


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"num_frozen_tokens=5 must be at least 0 and below num_virtual_tokens=5"):
        CartridgeConfig(**FIELDS, num_frozen_tokens=5)
    with pytest.raises(ConfigError, match="num_frozen_tokens=-1 must be at least 0"):
        CartridgeConfig(**FIELDS, num_frozen_tokens=-1)
    with pytest.raises(ConfigError, match="is for an encoder-decoder, but a cartridge is for a decoder"):
        replace(CartridgeConfig(**FIELDS), num_transformer_submodules=2)
    assert veneer.CartridgeConfig(**FIELDS).told()["num_frozen_tokens"] == 1
