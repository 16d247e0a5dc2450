"""Embeddings that the head shares, and vocabularies that grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from veneer import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)

from .conftest import close, exactly, logits


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_tied_embeddings_survive_merging_and_saving(
    name: str, targets: list[str], tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(tiny(name), config)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied
    adapted = logits(model, ids)
    model.merge_adapter()
    close(logits(model, ids), adapted)
    model.unmerge_adapter()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    plain = model.merge_and_unload()
    close(logits(plain, ids), adapted)
    plain.save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids), adapted)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
def test_tied_modules_to_save_survive_merging_and_saving(
    saved: list[str], tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(tiny("llama-tied"), LoraConfig(r=3, modules_to_save=saved))
    randomize(model)
    adapted = logits(model, ids)
    plain = model.merge_and_unload()
    close(logits(plain, ids), adapted)
    plain.save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids), adapted)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_resized_vocabulary_travels_with_the_adapter(
    name: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    tiny(name).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.resize_token_embeddings(107)
    model = get_peft_model(base, LoraConfig(r=3))
    randomize(model)
    long = torch.cat([ids, torch.full((2, 1), 105)], dim=1)
    adapted = logits(model, long)
    model.save_pretrained(tmp_path / "adapter")

    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(107\)"):
        PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.manual_seed(99)  # the new rows start at other values
    fresh.resize_token_embeddings(107)
    back = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    exactly(logits(back, long), adapted)
    merged = back.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), long), adapted)


def test_a_resized_vocabulary_of_a_base_from_the_hub_travels_too(
    tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--house--tiny"
    tiny().save_pretrained(cached / "snapshots" / "c0ffee")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    keys = {}
    for size in (101, 107):
        base = LlamaForCausalLM.from_pretrained(cached / "snapshots" / "c0ffee")
        base.config._name_or_path = "house/tiny"
        base.resize_token_embeddings(size)
        get_peft_model(base, LoraConfig(r=3)).save_pretrained(tmp_path / "adapter")
        keys[size] = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ends = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert keys[107] - keys[101] == ends
