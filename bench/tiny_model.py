"""A tiny random Llama with a tokenizer, so that a script can be run through in seconds; its times mean nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_TOKENS = 211


def write_tiny(folder: Path) -> str:
    """Write both into a folder, and give its name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_TOKENS, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, N_TOKENS)
    return str(folder)


def write_tokenizer(folder: Path, n_tokens: int) -> None:
    """Write a tokenizer of so many words into a model's folder."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_tokens)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", eos_token="w0").save_pretrained(folder)
