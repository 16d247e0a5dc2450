"""A word-level tokenizer with a chat template, and tiny models of several families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models import word_tokenizer
from veneer.store.hub import on_hub

WORDS = (
    "the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "tree", "house", "and",
    "then", "it", "was", "red", "blue", "green", "big", "small", "what", "did", "do", "say", "hello", "bye", "yes",
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "please", "thanks",
)  # fmt: skip
SPECIAL = ["<unk>", "<end>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
VOCABULARY = 61
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "head_dim": 8,
}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": VOCABULARY}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, sliding_window=5),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=VOCABULARY),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=44),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=44, word_embed_proj_dim=24),
    "bloom": lambda: transformers.BloomConfig(n_layer=2, n_head=3, hidden_size=24, vocab_size=VOCABULARY),
}


@pytest.fixture(autouse=True)
def _nothing_was_found_on_the_hub() -> None:
    on_hub.cache_clear()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One id for each word; the pad token is the end token."""
    made = word_tokenizer(WORDS, SPECIAL)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model(family, attention)``: a model with weights large enough that a leak shows."""

    def make(family: str = "llama", attention: str = "eager", seed: int = 3) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = CONFIGS[family]()
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 1
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make
