"""LLaMA-Adapter: the formula by hand, against PEFT in its three families, by rows, and beside other adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import veneer
from gradients import has_exact_gradients
from methods_in_peft import TOKENS, near
from veneer.errors import CompositionError, ConfigError, FormatError, TargetError
from veneer.model.attach.attach import adapted_layers, live_parameters
from veneer.records.attended import attended_change, turned
from veneer.store.adapter.records import read_records

N = 3
SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 71}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=4),
    "gpt2": GPT2Config(
        vocab_size=71, n_embd=24, n_layer=3, n_head=3, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    ),
}
FIELDS: dict[str, Any] = {"task_type": "CAUSAL_LM", "adapter_len": N, "adapter_layers": 2}
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
every_family = pytest.mark.parametrize("family", FAMILIES)


def base(family: str | PreTrainedConfig = "llama") -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[family] if isinstance(family, str) else family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    return model


def moved(model: Any) -> Any:
    """With gates away from zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.7 * torch.randn_like(parameter)
    return model.eval()


def with_peft(family: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    return moved(peft.get_peft_model(base(family), peft.AdaptionPromptConfig(**FIELDS | changes)))


def ours(family: str | PreTrainedConfig = "llama", **changes: Any) -> Any:
    torch.manual_seed(5)
    return moved(veneer.get_peft_model(base(family), veneer.AdaptionPromptConfig(**FIELDS | changes)))


def logits(model: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def test_the_formula_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 6, 4), (3, 2, 4), (3, 2, 4))
    )
    gate = torch.tensor([0.7], dtype=torch.float64)
    found = attended_change(queries, keys, values, gate).view(2, 5, 6, 4)
    for head in range(6):
        k, v = keys[:, head // 3], values[:, head // 3]
        scores = torch.exp(queries[:, :, head] @ k.T / 2)
        near(found[:, :, head], 0.7 * (scores / scores.sum(-1, keepdim=True)) @ v)
    given = [x.requires_grad_() for x in (queries, keys, values, gate)]
    assert has_exact_gradients(attended_change, given)


def test_queries_turn_by_their_positions() -> None:
    angle = torch.tensor([0.3, 1.1])
    cos, sin = (torch.cat([f(angle), f(angle)])[None, None] for f in (torch.cos, torch.sin))
    found = turned(torch.tensor([1.0, 2.0, 3.0, 5.0])[None, None, None], cos, sin).flatten()
    for place, (x, y) in enumerate(((1.0, 3.0), (2.0, 5.0))):
        c, s = math.cos(angle[place]), math.sin(angle[place])
        near(found[[place, place + 2]], torch.tensor([x * c - y * s, y * c + x * s]))


@every_family
def test_logits_loss_and_gradients_equal_pefts(family: str, tmp_path: Path) -> None:
    reference = with_peft(family)
    reference.save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(base(family), tmp_path, is_trainable=True)
    expected = reference(input_ids=TOKENS, labels=TOKENS)
    expected.loss.backward()
    assert (logits(base(family)) - expected.logits).norm() > 1e-2 * expected.logits.norm()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for checkpointing in (None, False, True):
        model.zero_grad()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.train()
        found = model(input_ids=TOKENS, labels=TOKENS)
        found.loss.backward()
        near(found.logits, expected.logits)
        near(found.loss, expected.loss)
        held = live_parameters(model, model.adapter_state, "default")
        assert held.keys() == wanted.keys()
        for key, value in held.items():
            assert wanted[key].abs().max() > 0
            near(value.grad, wanted[key])


@every_family
def test_files_go_both_ways(family: str, tmp_path: Path) -> None:
    reference = with_peft(family)
    reference.save_pretrained(tmp_path / "theirs")
    model = veneer.PeftModel.from_pretrained(base(family), tmp_path / "theirs")
    assert type(model.peft_config["default"]) is veneer.AdaptionPromptConfig
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == read.keys()
    assert all(torch.equal(read[key], value) for key, value in written.items())
    back = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    near(logits(back), logits(reference))
    records = read_records(tmp_path / "theirs").records
    assert {record.prompt.shape for record in records.values()} == {(N, 24)}
    assert len(records) == 2


@every_family
def test_generation_equals_pefts_and_whole_passes(family: str, tmp_path: Path) -> None:
    reference = with_peft(family)
    reference.save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(base(family), tmp_path)
    found, ids = model.generate(input_ids=TOKENS, **GENERATE), TOKENS
    for _ in range(GENERATE["max_new_tokens"]):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)
    assert torch.equal(found, reference.generate(input_ids=TOKENS, **GENERATE))


@every_family
def test_rows_of_a_batch_name_their_adapters(family: str) -> None:
    model = ours(family)
    model.add_adapter("other", veneer.AdaptionPromptConfig(**FIELDS | {"adapter_len": 5, "adapter_layers": 1}))
    target = "c_attn" if family == "gpt2" else "k_proj"
    model.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    model.set_adapter("other")
    moved(model)
    names = ["lora", "default", "__base__", "other"]
    tokens = torch.cat([TOKENS, TOKENS.flip(0)])
    mixed = logits(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        with model.adapter_state.only(() if name == "__base__" else (name,)):
            near(mixed[row], logits(model, tokens)[row])
    assert (mixed[1] - mixed[2]).norm() > 1e-2


def test_it_acts_together_with_lora() -> None:
    """As on a base that LoRA's update of queries and outputs is folded into."""
    model = ours()
    config = veneer.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("lora", config)
    model.set_adapter(["default", "lora"])
    together = logits(model)
    folded = ours()
    with torch.no_grad():
        for path, layer in adapted_layers(model).items():
            folded.get_submodule(path).weight += layer.record("lora").added()
    near(together, logits(folded))
    assert (together - logits(ours())).norm() > 1e-2


def test_the_bias_of_the_output_projection_is_added_once() -> None:
    """At a gate of zero PEFT adds it a second time: its start is not the base."""
    config = LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, attention_bias=True)
    plain = base(config)
    biases = {name: torch.randn_like(p) for name, p in plain.named_parameters() if name.endswith("o_proj.bias")}
    plain.load_state_dict(biases, strict=False)
    expected = logits(plain)
    assert torch.equal(logits(veneer.get_peft_model(plain, veneer.AdaptionPromptConfig(**FIELDS))), expected)
    theirs = base(config)
    theirs.load_state_dict(biases, strict=False)
    theirs = peft.get_peft_model(theirs, peft.AdaptionPromptConfig(**FIELDS))
    assert (logits(theirs) - expected).norm() > 1e-2


def test_heads_may_have_a_width_of_their_own() -> None:
    config = LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1, head_dim=10)
    model = ours(config)
    assert (logits(model) - logits(base(config))).norm() > 1e-2


def test_a_sixteen_bit_base_has_parameters_in_float32() -> None:
    model = veneer.get_peft_model(base().to(torch.bfloat16), veneer.AdaptionPromptConfig(**FIELDS))
    held = live_parameters(model, model.adapter_state, "default")
    assert {value.dtype for value in held.values()} == {torch.float32}
    assert logits(moved(model)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_len": 0}, "adapter_len=0 must be a whole number of at least 1"),
        ({"adapter_layers": 0}, "adapter_layers=0 must be a whole number of at least 1"),
        ({"adapter_layers": 4}, "adapter_layers=4 is more than the model's 3 layers: give at most 3"),
        ({"target_modules": "mlp"}, "target_modules='mlp' names no attention of this llama: give 'self_attn'"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(**fields)


def test_other_families_are_refused() -> None:
    with pytest.raises(TargetError, match=r"families \['gpt2', 'llama', 'mistral'\], and this is qwen3: use"):
        ours(Qwen3Config(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=4))


def test_it_cannot_be_merged_or_combined() -> None:
    model = ours()
    with pytest.raises(CompositionError, match="cannot be"):
        model.merge_adapter()
    with pytest.raises(CompositionError, match="is no update of linear layers"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_file_with_another_number_of_layers(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"adapter_layers": 2', '"adapter_layers": 3'))
    with pytest.raises(FormatError, match="it has 2 layers, but its config says 3"):
        read_records(tmp_path)
