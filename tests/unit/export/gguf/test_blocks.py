"""Weights that are read block by block equal those that are read whole, whatever an adapter does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapters.peft_model import get_peft_model
from veneer.disk.safetensors import StoredTensor
from veneer.export import base_weights
from veneer.export.folded import FoldedCheckpoint
from veneer.methods.lora import LoraConfig
from veneer.records import linear

from .tiny import VOCAB, WIDTH, tiny_folder

CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "base": ("llama", None),
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head apart": ("mistral", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "rows": ("mistral", {"target_modules": ["o_proj"], "trainable_token_indices": [3, 8]}),
    "turned": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "experts": ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_the_rows(tmp_path: Path, case: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, base_weights):  # so that even a tiny tensor has several blocks, the last one shorter
        monkeypatch.setattr(module, "BLOCK_VALUES", 700)
    family, settings = CASES[case]
    model = tiny_folder(tmp_path / "base", family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    if settings is not None:
        torch.manual_seed(4)
        adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / "adapter")
    adapter = None if settings is None else tmp_path / "adapter"
    whole, streamed = (FoldedCheckpoint(tmp_path / "base", adapter, wide=wide) for _ in range(2))
    n_blocks = 0
    for name in whole.specs:
        blocks = list(streamed.blocks(name))
        n_blocks += len(blocks)
        expected = whole.read(name)
        assert torch.equal(torch.cat(blocks) if len(blocks) > 1 else blocks[0], expected), name
        assert tuple(expected.shape) == whole.specs[name][1]
    assert n_blocks > 2 * len(whole.specs)


@pytest.mark.parametrize(
    ("settings", "changed", "left_out"),
    [
        ({"target_modules": ["embed_tokens", "v_proj"]}, False, True),
        ({"target_modules": ["embed_tokens", "v_proj"]}, True, False),
        ({"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}, False, False),  # trained whole: needed
    ],
)
def test_the_base_s_own_embeddings_in_an_adapter_s_file_are_not_read(
    tmp_path: Path, settings: dict[str, Any], changed: bool, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder(tmp_path / "base", "mistral")
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings))
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (table,) = (name for name, tensor in tensors.items() if tensor.shape == (VOCAB, WIDTH))
    tensors[table][5, 7] += 3 if changed else 0
    save_file(tensors, file)
    expected = FoldedCheckpoint(tmp_path / "base", tmp_path / "adapter").read("model.embed_tokens.weight")
    read: list[str] = []
    whole = StoredTensor.read

    def watched(stored: StoredTensor) -> torch.Tensor:
        read.append(stored.name)
        return whole(stored)

    monkeypatch.setattr(StoredTensor, "read", watched)
    folded = FoldedCheckpoint(tmp_path / "base", tmp_path / "adapter")
    assert (table not in read) is left_out
    assert torch.equal(folded.read("model.embed_tokens.weight"), expected)
    factors = {name.split(".")[-1]: tensor for name, tensor in tensors.items() if "lora_embedding" in name}
    update = (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).T * 7 / 3 if factors else 0
    torch.testing.assert_close(expected, tensors[table] + update)
