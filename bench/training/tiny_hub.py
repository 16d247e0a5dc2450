"""Tiny random models under the names of those on the hub that PEFT's tests ask for, in the layout of the hub's cache.

``fill(folder)`` writes them; with ``HF_HUB_CACHE=folder`` and ``HF_HUB_OFFLINE=1`` they are found without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

N_TOKENS = 307
REVISION = "0" * 40
SIZES = {"vocab_size": N_TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
BERT = {**SIZES, "intermediate_size": 37, "max_position_embeddings": 128, "type_vocab_size": 2}
OPT = {"vocab_size": N_TOKENS, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 100, "pad_token_id": 1}
GPT2 = {"vocab_size": N_TOKENS, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}
T5 = {"vocab_size": N_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": N_TOKENS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4}
BART |= {"decoder_ffn_dim": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"max_position_embeddings": 128}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**OPT, "hidden_size": 32, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        {**SIZES, "intermediate_size": 37, "max_position_embeddings": 128},
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"vocab_size": N_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        {**LLAMA, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**LLAMA, "pad_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ResNetForImageClassification", RESNET),
}


def fill(cache: Path) -> None:
    """Write every model, with a byte-level tokenizer, where the hub's client looks for it."""
    for number, (name, (kind, sizes)) in enumerate(MODELS.items()):
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        if snapshot.exists():
            continue
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        torch.manual_seed(number)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**sizes))
        spread(model)
        model.save_pretrained(snapshot)
        if "vocab_size" in sizes:
            tokenizer().save_pretrained(snapshot)
        else:
            transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(snapshot)


def spread(model: torch.nn.Module) -> None:
    """Weights of a size that makes outputs differ: those of a fresh tiny model give nearly equal logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per byte, and three special ones."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *sorted(letters)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
