"""Tiny models of many families, and their GGUF files as llama.cpp's converter writes them, key by key.

The converter's rules are spelled out here by the writer's own methods: this file is the oracle of the reader's table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from gguf import GGUFWriter, RopeScalingType

WIDTH, HEADS, VOCAB = 96, 4, 61
COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 104, "num_hidden_layers": 3,
    "max_position_embeddings": 96,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
RMS, LAYER_NORM = {"rms_norm_eps": 3e-4}, {"layer_norm_epsilon": 3e-4}
MODEL_TYPES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text",
}  # fmt: skip
THETA = 700.0


def tiny(family: str, **settings: Any) -> Any:
    """A model with values that are not neutral, large enough for attention to tell positions apart."""
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(MODEL_TYPES.get(family, family), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12)
    return model


def write(path: Path, family: str, model: Any, more: Callable[[GGUFWriter], None] = lambda writer: None) -> None:
    """The file of a model; ``more`` adds to it or spoils it."""
    writer = GGUFWriter(path, family)
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    _KEYS[family](writer, config)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family), config.num_hidden_layers
    )
    for name, values in model.named_parameters():
        for stored, tensor in _stored(family, name, values.detach(), config, names):
            writer.add_tensor(stored, tensor.contiguous().float().numpy())
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_factors(writer: GGUFWriter, **factors: list[float]) -> None:
    for name, values in factors.items():
        writer.add_tensor(f"{name}.weight", torch.tensor(values).numpy())


def _decoder(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)


def _heads(writer: GGUFWriter, config: Any) -> int:
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None):
        writer.add_key_length(head)
        writer.add_value_length(head)
    return head


def _rope(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    kind, factor = rope["rope_type"], rope.get("factor")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind == "llama3":
        add_factors(writer, rope_freqs=_llama3_factors(config, rope))


def _llama3_factors(config: Any, rope: dict[str, Any]) -> list[float]:
    """As the converter has them: frequency by frequency."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, length = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for index in range(0, head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(rope["factor"])
        else:
            share = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - share) / rope["factor"] + share))
    return found


def _llama(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = _heads(writer, config)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head)
    _rope(writer, config, config.rope_parameters)


def _moe(writer: GGUFWriter, config: Any) -> None:
    _llama(writer, config)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _heads(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _heads(writer, config)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _rope(writer, config, config.rope_parameters["full_attention"])
    writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    _decoder(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        ratio = config.max_position_embeddings / config.original_max_position_embeddings
        usual = math.sqrt(1 + math.log(ratio) / math.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor", usual))
        add_factors(writer, rope_factors_long=rope["long_factor"], rope_factors_short=rope["short_factor"])


def _gpt2(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _stablelm(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _starcoder2(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_eps(config.norm_epsilon)
    _rope(writer, config, config.rope_parameters)


def _nemotron(writer: GGUFWriter, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * _heads(writer, config)))
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _falcon(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_tensor_data_layout("jploski")
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _bloom(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(2048)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


_KEYS: dict[str, Callable[[GGUFWriter, Any], None]] = {
    "llama": _llama, "qwen2": _llama, "qwen3": _llama, "qwen2moe": _moe, "qwen3moe": _moe, "gemma2": _gemma2,
    "gemma3": _gemma3, "phi3": _phi3, "gpt2": _gpt2, "stablelm": _stablelm, "starcoder2": _starcoder2,
    "nemotron": _nemotron, "falcon": _falcon, "bloom": _bloom,
}  # fmt: skip


def _stored(
    family: str, name: str, values: torch.Tensor, config: Any, names: gguf.TensorNameMap
) -> list[tuple[str, torch.Tensor]]:
    """The tensors that llama.cpp keeps of a parameter."""
    if name.endswith("experts.gate_up_proj"):
        layer = f"blk.{name.split('.')[2]}"
        return [
            (f"{layer}.ffn_{half}_exps.weight", part)
            for half, part in zip(("gate", "up"), values.chunk(2, 1), strict=True)
        ]
    stem, _, suffix = name.rpartition(".")
    if name.endswith("shared_expert_gate.weight"):
        values = values[0]
    if name.endswith("experts.down_proj"):
        stem, suffix = name, "weight"
    found = names.get_name(stem.removeprefix("transformer.")) if family == "bloom" else names.get_name(stem)
    return [(f"{found}.{suffix}", _laid_out(family, name, values, config))]


def _laid_out(family: str, name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    if family == "llama" and ("q_proj" in name or "k_proj" in name):  # neighbours rotate, not halves
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    if family in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return values + 1
    if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if family == "bloom" and "query_key_value" in name:  # q, k, v of a head, to all q, all k, all v
        return values.reshape(config.n_head, 3, -1, *values.shape[1:]).transpose(0, 1).reshape(values.shape)
    return values
