"""Tiny configs of transformers' own types: sizes by the names of fields, and what one type has by other rules."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

VOCABULARY, END = 263, 262
CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
IMAGES = sorted(
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    - MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
)
CLASSES = sorted(
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys() | MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.keys())
    & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
)
_NOT_CAUSAL = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("emb_dim", "embed_dim", "embedding_dim", "out_hidden_size", "text_hidden_size"), 32),
    **dict.fromkeys(("projection_dim", "projector_hidden_size", "projection_hidden_size", "hidden_size_global"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "mlp_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "alignment_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "num_blocks", "moe_topk"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "linear_num_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "zero_expert_num", "num_codebooks"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "num_expert_group"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "rotary_dim", "dim_head"), 8),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "num_position_embeddings", "sliding_window_size"), 16),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size_per_layer_input": 8, "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 16,
    "first_k_dense_replace": 1, "num_kv_shared_layers": 0, "rel_extent": 32, "encoder_hash_byte_group_vocab": 64,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "index_head_dim": 8,
    "base_channels": 32, "num_embeddings": 64, "codebook_size": 64, "moe_hidden_size": 32, "max_source_positions": 64,
    "index_n_heads": 2, "merged_hidden_size": 64, "prompt_length": 2, "laurel_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "state_size": 8,
    "time_step_rank": 4, "mamba_dt_rank": 4, "lru_width": 32,
}  # fmt: skip
_ENDS = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0, "decoder_start_token_id": 1}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_AXES = {"rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1]}}
_OF_THREE_AXES = (
    *("qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_vl"),
    *("glm46v", "glm4v", "glm_ocr", "glmga"),
)
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64} | {
    "indexer_compress_ratio": 4, "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64
}  # fmt: skip
_ROUTED = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_SMALL_SAM = {"vision_config": {"sam_config": {"image_size": 64}}}
# What one type has by other rules; a part of the config is a dict in it.
_OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "n_mamba_heads": 8,
        "mamba_headdim": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "blt": {
        "encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64},
        "global_config": {"hidden_size": 64, "head_dim": 16},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROTARY, "mrope_section": [2, 1, 1]}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {**_ROTARY, "mrope_section": [2, 1, 1]}}}
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "mistral4": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 8, **_THREE_AXES}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}, "image_token_id": 5},
    "deepseek_ocr2": {"text_config": {**_ROUTED, "mlp_layer_types": ["dense", "sparse"]}, **_SMALL_SAM},
    "unlimited_ocr": _SMALL_SAM,
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 64}},
    "got_ocr2": {"vision_config": {"image_size": 64}},
    "pp_chart2table": {"vision_config": {"image_size": 64}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "granite4_vision": {"deepstack_layer_map": []},
    "step3p7": {
        "text_config": {"layer_types": ["full_attention"] * 2, "sliding_window": 16},
        "vision_config": {"mlp_ratio": 1.5},
    },
    **{name: {"text_config": _THREE_AXES} for name in _OF_THREE_AXES},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], **_THREE_AXES}},
    "kolibri1_1": {"index_layers": [1], "kv_source_layers": [0, 1], "head_dim": 16, "index_num_heads": 2},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "roc_bert": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 8, "shape_embed_dim": 8
    },
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
_GIVEN = {"hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"}  # their configs derive sizes from others


def tiny_config(name: str) -> PreTrainedConfig:
    """Return transformers' config of a type with tiny sizes: set on the usual one, or given to it.

    A name may begin with a kind: ``seq2seq/bart`` is an encoder with a decoder, ``bart`` the decoder alone, and
    ``classes/bert`` has a head of classes.
    """
    of_kind, _, model_type = name.rpartition("/")
    kind = CONFIG_MAPPING[model_type]
    config = _shrunk(kind())
    if model_type in _GIVEN:
        usual = kind().to_dict()
        given = {name: size for name, size in {**SIZES, **_ENDS}.items() if type(usual.get(name)) is int}
        config = kind(**given, **{k: 8 for k in ("head_dim",) if k in usual and usual[k] is None})
    if of_kind == "seq2seq":
        config.decoder_start_token_id = 1
    elif of_kind == "classes":
        config.num_labels = 3
    elif model_type in _NOT_CAUSAL and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config.is_decoder, config.is_encoder_decoder = True, False
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    _set(config, _OWN.get(model_type, {}))
    return config


def _set(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _set(part, value)
        else:
            setattr(config, name, value)


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    held, names = config.to_dict(), config.attribute_map
    n_layers = held.get(names.get("num_hidden_layers", "num_hidden_layers"))
    for name, size in SIZES.items():
        own = names.get(name, name)
        if type(held.get(own)) is int:
            setattr(config, own, size)
        elif isinstance(held.get(own), list) and len(held[own]) == n_layers:
            setattr(config, own, [size] * 2)
    if "kv_lora_rank" in held:  # keys come from one latent row a token, for each head
        config.num_key_value_heads = SIZES["num_attention_heads"]
    if held.get("per_layer_config"):
        config.per_layer_config = {}
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            _shrunk(part)
    for name, values in list(vars(config).items()):
        if isinstance(values, list | tuple) and len(values) > 2 and name != "architectures":
            if all(isinstance(v, str) for v in values):
                kinds = list(dict.fromkeys(values))
                setattr(config, name, [kinds[0], kinds[-1]])
            elif len(values) == n_layers:
                setattr(config, name, [values[0], values[-1]])
    for name, value in held.items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
            setattr(config, name, 0.0)
    for name, id in _ENDS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, id)
    return config
