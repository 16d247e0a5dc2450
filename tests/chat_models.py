"""A tiny chat model with a tokenizer, and an adapter for it, in folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models import byte_tokenizer, llama_config
from veneer import LoraConfig, get_peft_model


def tiny_model(seed: int = 7, hidden: int = 48) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = llama_config(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=61,
        max_position_embeddings=131,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path) -> Path:
    """A LoRA adapter that changes the model's answers."""
    folder = model_folder.parent / "adapter"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
    )
    fill(model)
    model.save_pretrained(folder)
    return folder


def fill(model: torch.nn.Module) -> None:
    """Adapter parameters that are not neutral."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.normal_(0, 0.5)
