"""Tiny models and tokenizers for tests, with a size of its own for every axis, so that none is taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 24: three query heads of 8 on one key head, 37 features within, 67 tokens."""
    sizes = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, "num_attention_heads": 3, "num_key_value_heads": 1, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    """Two layers of width 24 with three heads, 67 tokens, 31 learned positions; its layers store Wᵀ."""
    return GPT2Config(**{"vocab_size": 67, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 31, **changes})


def byte_tokenizer(roles: Sequence[str] = ROLES) -> PreTrainedTokenizerFast:
    """One token for each byte, ``<|end|>`` (id 0) and the roles of a chat in front of them, and a chat template."""
    special = ["<|end|>", *roles]
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*special, *bytes_to_unicode().values()])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": list(roles)})
    made.chat_template = CHAT_TEMPLATE
    return made


def word_tokenizer(words: Sequence[str], special: Sequence[str] = ("<unk>", "<end>")) -> PreTrainedTokenizerFast:
    """One token for each word between spaces; the first two special tokens are the unknown word and the end."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token=special[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, end = special[:2]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token=end, pad_token=end)
