"""Tiny models in several families with a tokenizer of bytes, and adapters of every method in folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from veneer import (
    AdaLoraConfig,
    BottleneckConfig,
    C3AConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoRARequest,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)

END, VOCAB = 256, 263  # some ids that no text has, as padded vocabularies do
SHAPE = {
    "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "head_dim": 8, "max_position_embeddings": 127,
    "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "wide": lambda: transformers.LlamaConfig(
        **SHAPE
        | {"hidden_size": 64, "intermediate_size": 80, "head_dim": 16, "num_attention_heads": 4}
        | {"num_key_value_heads": 4}
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE, sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=7.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=3,
        vocab_size=VOCAB,
        n_positions=127,
        eos_token_id=END,
        bos_token_id=END,
        tie_word_embeddings=False,
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=3),
}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "o_proj", "up_proj"]),
    "lora_bias": lambda: LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=["v_proj", "q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=5, target_modules=["q_proj", "v_proj"]),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["q_proj", "v_proj"]),
    "loha": lambda: LoHaConfig(r=2, alpha=5, target_modules=["q_proj", "down_proj"]),
    "hra": lambda: HRAConfig(r=4, target_modules=["v_proj", "up_proj"]),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj", "o_proj", "down_proj"]),
    "lokr": lambda: LoKrConfig(r=2, alpha=5, target_modules=["v_proj", "gate_proj"]),
    "shira": lambda: ShiraConfig(r=3, target_modules=["k_proj", "down_proj"]),
    "c3a": lambda: C3AConfig(block_size=4, target_modules=["q_proj", "up_proj"]),
    "hira": lambda: HiraConfig(r=3, target_modules=["v_proj", "gate_proj"]),
    "fourierft": lambda: FourierFTConfig(n_frequency=40, target_modules=["q_proj", "down_proj"]),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=5),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5),
    "multitask": lambda: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_ranks=2),
    "ptuning": lambda: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=11),
    "saved": lambda: LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
    "head": lambda: LoraConfig(r=2, lora_alpha=5, target_modules=["lm_head", "embed_tokens"]),
    "tokens": lambda: LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["v_proj"],
        trainable_token_indices={"embed_tokens": [5, 88, 213], "lm_head": [44, 70]},
    ),
}


def make_model(family: str | PreTrainedConfig = "llama", seed: int = 3) -> PreTrainedModel:
    """A float32 model with weights large enough that a leak shows."""
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(FAMILIES[family]() if isinstance(family, str) else family, **eager)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = END
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and an end token."""
    bytes_ = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<end>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return made


def save_adapter(folder: Path, config: Any, family: str | PreTrainedConfig = "llama", seed: int = 5) -> Path:
    """An adapter away from its start, saved."""
    model = get_peft_model(make_model(family), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest]:
    """One adapter of each of `METHODS`, by its name; tests/contract/test_served.py has every method."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: LoRARequest(name, number, str(save_adapter(folder / name, config(), seed=number)))
        for number, (name, config) in enumerate(METHODS.items(), start=1)
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `byte_tokenizer`."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def long_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context that has room for descriptions of tools."""
    folder = tmp_path_factory.mktemp("long") / "base"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
