"""The method of CONTRIBUTING.md, one file that nothing else knows, through everything that reads methods."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from typer.testing import CliRunner

import veneer
from veneer.cli.app import app
from veneer.model.attach.attach import outward_parameters
from veneer.optim import lora_plus_groups
from veneer.recipe.adapter import adapter_problems
from veneer.recipe.methods import adapter_config, imported

SIZES: dict[str, Any] = {"hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 67}
BASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=7, num_key_value_heads=1, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, num_attention_heads=7, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=67, n_embd=28, n_layer=2, n_head=7, n_positions=32),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
TOKENS = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])


def make_base(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(41)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def trained(base: PreTrainedConfig, config: Any) -> PreTrainedModel:
    """A model with an adapter that is away from its start."""
    model = veneer.get_peft_model(make_base(base), config)
    torch.manual_seed(43)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@every_base
def test_its_own_default_targets_are_taken_on_every_family(base, toy):
    """Also where PEFT's table has other modules for LoRA; roles are found by the description of the decoder."""
    targets = veneer.get_peft_model(make_base(base), toy()).targeted_module_names
    expected = {"c_attn", "c_fc"} if base.model_type == "gpt2" else {"k_proj", "up_proj"}
    assert {path.rpartition(".")[2] for path in targets} == expected


@every_base
def test_a_method_dropped_into_the_folder_trains_saves_loads_and_merges(base, toy, tmp_path):
    model = veneer.get_peft_model(make_base(base), toy())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=9.0)
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    model.eval().save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "TOY"
    loaded = veneer.PeftModel.from_pretrained(make_base(base), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-10, atol=1e-10)


@every_base
def test_a_method_dropped_into_the_folder_mixes_in_a_batch(base, toy):
    model = trained(base, toy())
    lora = veneer.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False)
    model = veneer.get_peft_model(model, lora, "lora").eval()
    alone = {}
    for name in ("default", "lora"):
        model.set_adapter(name)
        alone[name] = logits(model)
    mixed = model(TOKENS, adapter_names=["lora", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["lora"][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed[1], alone["default"][1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(alone["lora"], alone["default"], atol=1e-3)


def test_info_tells_its_modules(toy, tmp_path):
    trained(BASES["llama"], toy(strength=3.0)).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["info", str(tmp_path), "--json"])
    facts = json.loads(result.stdout)
    layers = [f"model.layers.{i}" for i in range(2)]
    assert facts["modules"] == [path for each in layers for path in (f"{each}.mlp.up_proj", f"{each}.self_attn.k_proj")]


def test_recipes_know_it_by_name(toy):
    assert adapter_problems({"method": "toy", "strength": 3.0}, imported().methods) == []
    assert adapter_config({"method": "toy", "strength": 3.0}) == toy(strength=3.0)
    assert "adapter.strenght" in adapter_problems({"method": "toy", "strenght": 3.0}, imported().methods)[0]


def test_lora_plus_lets_what_is_outward_learn_faster(toy):
    model = trained(BASES["llama"], toy())
    groups = lora_plus_groups(model.named_parameters(), 1e-3, ratio=7, outward=outward_parameters(model))
    assert [(group["lr"], len(group["params"])) for group in groups] == [(pytest.approx(7e-3), 4)]


def test_combined_on_disk_it_is_the_sum_with_what_it_is_combined_with(toy, tmp_path):
    """Its files do not tell the widths of layers: the config of the base that they name does."""
    make_base(BASES["llama"]).save_pretrained(tmp_path / "base")
    parts = {"toy": toy(strength=3.0), "lora": veneer.LoraConfig(r=3, target_modules=["q_proj", "k_proj"])}
    merged = {}
    for name, config in parts.items():
        config = replace(config, base_model_name_or_path=str(tmp_path / "base"))
        model = trained(BASES["llama"], config)
        model.save_pretrained(tmp_path / name)
        merged[name] = model.merge_and_unload().state_dict()
    arguments = ["combine", tmp_path / "toy", tmp_path / "lora", "--weights", "0.7 -0.3", "-o", tmp_path / "both"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    base = make_base(BASES["llama"])
    own = {key: value.clone() for key, value in base.state_dict().items()}
    both = veneer.PeftModel.from_pretrained(base, tmp_path / "both").merge_and_unload().state_dict()
    for key, value in own.items():
        wanted = value + 0.7 * (merged["toy"].get(key, value) - value) - 0.3 * (merged["lora"][key] - value)
        added = f"{key.removesuffix('bias')}bias" if key.endswith("bias") else key
        torch.testing.assert_close(both[added], wanted, rtol=1e-9, atol=1e-9)
