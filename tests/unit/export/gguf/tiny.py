"""Tiny models of every family that is written, with no value neutral, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models import CHAT_TEMPLATE

WIDTH, HEADS, VOCAB = 96, 4, 271
COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": 3,
    "max_position_embeddings": 128, "num_attention_heads": HEADS, "num_key_value_heads": 2, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
RMS, THETA = {"rms_norm_eps": 3e-4}, 700.0
PLAIN = {"rope_type": "default", "rope_theta": THETA}
LLAMA3 = {
    **PLAIN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 2.5}
YARN = {**PLAIN, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}
LONGROPE = {
    **PLAIN, "rope_type": "longrope", "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.125 * i for i in range(9)], "long_factor": [1.5 + 0.75 * i for i in range(9)],
}  # fmt: skip
DECODER = {**COMMON, **RMS}
GEMMA = {**DECODER, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "rope_parameters": PLAIN}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**DECODER, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**DECODER, "rope_parameters": LINEAR, "attention_bias": True, "head_dim": 32}),
    "llama-yarn": ("llama", {**DECODER, "rope_parameters": YARN}),
    "mistral": ("mistral", {**DECODER, "rope_parameters": PLAIN, "sliding_window": None, "num_key_value_heads": 1}),
    "ministral3": ("ministral3", {
        **DECODER, "head_dim": 32, "sliding_window": None, "rope_parameters": {
            **YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "beta_fast": 20.0,
            "beta_slow": 2.0,
        },
    }),
    "mixtral": ("mixtral", {
        **DECODER, "rope_parameters": PLAIN, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None,
    }),
    "qwen2": ("qwen2", {**DECODER, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**DECODER, "rope_parameters": PLAIN, "head_dim": 32}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 6, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {
        **DECODER, "num_key_value_heads": HEADS, "num_experts": 6, "num_experts_per_tok": 3, "rope_parameters": PLAIN,
    }),
    "gpt_oss": ("gpt_oss", {
        **DECODER, "head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64,
        "sliding_window": 9, "rope_parameters": YARN,
    }),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 7.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {
        **GEMMA, "num_hidden_layers": 7, "rope_parameters": {
            "full_attention": {**LINEAR, "rope_theta": 900.0}, "sliding_attention": PLAIN,
        },
    }),
    "phi3": ("phi3", {
        **DECODER, "max_position_embeddings": 900, "original_max_position_embeddings": 300, "rope_parameters": LONGROPE,
    }),
    "phi3-plain": ("phi3", {**DECODER, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}}),
    "gpt2": ("gpt2", {
        "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "n_positions": 128, "n_inner": 160,
        "layer_norm_epsilon": 3e-4, "bos_token_id": 0, "eos_token_id": 0,
    }),
    "gptneox": ("gpt_neox", {
        **COMMON, "layer_norm_eps": 3e-4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
        "use_parallel_residual": True,
    }),
    "stablelm": ("stablelm", {
        **COMMON, "layer_norm_eps": 3e-4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
        "use_qkv_bias": True, "tie_word_embeddings": True,
    }),
    "stablelm-norms": ("stablelm", {
        **COMMON, "layer_norm_eps": 3e-4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25},
        "qk_layernorm": True, "use_parallel_residual": True,
    }),
    "olmo2": ("olmo2", {**DECODER, "rope_parameters": PLAIN}),
    "olmo3": ("olmo3", {
        **DECODER, "num_hidden_layers": 5, "sliding_window": 9,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    }),
    "smollm3": ("smollm3", {**DECODER, "num_hidden_layers": 5, "rope_parameters": PLAIN}),
    "granite": ("granite", {
        **DECODER, "rope_parameters": PLAIN, "attention_multiplier": 0.23, "embedding_multiplier": 3.5,
        "residual_multiplier": 0.7, "logits_scaling": 1.6,
    }),
}  # fmt: skip


def tiny_model(family: str, **changes: Any) -> Any:
    """A model of a family with values that are not neutral, large enough for attention to tell positions apart."""
    model_type, settings = SETTINGS[family]
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12)
    return model


def image_model() -> Any:
    """A Gemma 3 with images, whose text half is the family "gemma3"."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.Gemma3Config(
        text_config=SETTINGS["gemma3"][1],
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=269,
    )
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12)
    return model


def tokenizer() -> Any:
    """Bytes, eight merges, an end of turn that is no EOS, and a chat template; three ids are left over."""
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("1", "2"), ("e", "r"), ("Ġ", "Ġ"), ("o", "n")]
    tokens = ["<|end|>", "<|user|>", "<|assistant|>", "<|stop|>", *bytes_to_unicode().values()]
    tokens += ["".join(merge) for merge in merges]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|stop|>", pad_token="<|stop|>")
    made.add_special_tokens({"additional_special_tokens": tokens[:3]})
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_folder(path: Path, family: str, **changes: Any) -> Any:
    """Writes a model and its tokenizer into a folder and gives the model."""
    model = tiny_model(family, **changes)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model
