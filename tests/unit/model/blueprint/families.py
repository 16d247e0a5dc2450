"""A small model of every family whose description is tested: sizes distinct, and whatever a config can say said."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Dots1Config,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FalconConfig,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    HyperCLOVAXConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MellumConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NanoChatConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
    StableLmConfig,
    Starcoder2Config,
    VaultGemmaConfig,
)

from veneer.model.blueprint.names import CORRECTIONS

SIZES: dict[str, Any] = {
    "hidden_size": 42, "intermediate_size": 58, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 14, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
WIDE = {**SIZES, "hidden_size": 84}
SQUARE = {k: v for k, v in WIDE.items() if k not in ("num_key_value_heads", "head_dim")}
OLD: dict[str, Any] = {"n_embd": 42, "n_layer": 3, "n_head": 3, "n_inner": 58, "vocab_size": 97, "n_positions": 64}
GEMMA: dict[str, Any] = {**SIZES, "query_pre_attn_scalar": 11, "sliding_window": 5, "final_logit_softcapping": 2.3}
MOE: dict[str, Any] = {**WIDE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
GROUPED: dict[str, Any] = {**WIDE, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
TURNS = ["sliding_attention", "full_attention"] * 2

LINEAR = {"rope_type": "linear", "factor": 2.7}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.7}
ALPHA = {**DYNAMIC, "alpha": 11.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
LLAMA3 = {"rope_type": "llama3", "factor": 5.0, "low_freq_factor": 1.3, "high_freq_factor": 3.7}
YARN = {"rope_type": "yarn", "factor": 3.1, "beta_fast": 3.0, "beta_slow": 0.3}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 1.9, 2.3, 2.9],
    "long_factor": [2.0, 2.1, 2.3, 3.1, 3.7, 4.1, 5.3],
}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.3}


def rope(parameters: dict[str, Any], original: int | None = None) -> dict[str, Any]:
    """Rotary parameters for a config, which writes into what it is given."""
    given = {"rope_theta": 523.0, **copy.deepcopy(parameters)}
    return {"rope_parameters": given if original is None else {**given, "original_max_position_embeddings": original}}


MPT: dict[str, Any] = {
    "d_model": 42, "n_heads": 6, "n_layers": 3, "vocab_size": 97, "max_seq_len": 64, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "hidden_size": 84, "ffn_hidden_size": 58, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "arcee": ArceeConfig(**SIZES),
    "bigcode": GPTBigCodeConfig(**OLD),
    "bigcode, all heads": GPTBigCodeConfig(multi_query=False, **OLD),
    "bloom": BloomConfig(hidden_size=42, n_layer=3, n_head=6, vocab_size=97),
    "bloom, 3 heads": BloomConfig(hidden_size=42, n_layer=3, n_head=3, vocab_size=97),
    "cohere": CohereConfig(logit_scale=0.3, **WIDE),
    "cohere, normed heads": CohereConfig(logit_scale=0.3, use_qk_norm=True, **WIDE),
    "cohere2": Cohere2Config(sliding_window=5, logit_scale=0.3, layer_types=TURNS, **WIDE),
    "cwm": CwmConfig(sliding_window=5, layer_types=TURNS, **SIZES),
    "ernie4_5": Ernie4_5Config(**SIZES),
    "exaone4": Exaone4Config(sliding_window=5, layer_types=TURNS, **WIDE),
    "falcon": FalconConfig(**FALCON),
    "falcon, groups": FalconConfig(new_decoder_architecture=True, num_kv_heads=2, bias=True, **FALCON),
    "falcon, groups, one norm": FalconConfig(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, **FALCON
    ),
    "falcon, by positions": FalconConfig(alibi=True, multi_query=False, parallel_attn=False, bias=True, **FALCON),
    "falcon, all heads, serial": FalconConfig(multi_query=False, parallel_attn=False, bias=True, **FALCON),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(attn_logit_softcapping=3.0, **GEMMA),
    "gemma3": Gemma3TextConfig(
        layer_types=TURNS,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 37.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 523.0},
        },
        **GEMMA,
    ),
    "glm": GlmConfig(**{**SIZES, "head_dim": 12}),
    "glm4": Glm4Config(**{**SIZES, "head_dim": 12}),
    "gpt2": GPT2Config(scale_attn_by_inverse_layer_idx=True, **OLD),
    "gptj": GPTJConfig(rotary_dim=6, **OLD),
    "gptj, whole heads": GPTJConfig(rotary_dim=14, **OLD),
    "granite": GraniteConfig(
        embedding_multiplier=1.7, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=2.9, **SIZES
    ),
    "granite experts": GraniteMoeConfig(
        num_local_experts=5, num_experts_per_tok=3, embedding_multiplier=1.7, residual_multiplier=0.3,
        attention_multiplier=0.2, logits_scaling=2.9, **SIZES,
    ),
    "helium": HeliumConfig(**WIDE),
    "hunyuan": HunYuanDenseV1Config(**SIZES, **rope(ALPHA)),
    "hunyuan, dynamic": HunYuanDenseV1Config(attention_bias=True, **WIDE, **rope(DYNAMIC)),
    "hunyuan experts": HunYuanMoEV1Config(
        num_experts=5, moe_topk=2, **{**WIDE, "intermediate_size": 60}, **rope(ALPHA)
    ),
    "hyperclovax": HyperCLOVAXConfig(
        embedding_multiplier=1.7, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=2.9, **SIZES
    ),
    "hyperclovax, without post-norms": HyperCLOVAXConfig(use_post_norm=False, residual_multiplier=0.3, **SIZES),
    "lfm2": Lfm2Config(layer_types=["conv", "full_attention"] * 2, conv_bias=True, conv_L_cache=4, **SIZES),
    "lfm2 experts": Lfm2MoeConfig(
        layer_types=["conv", "full_attention"] * 2, conv_L_cache=3, num_experts=6, num_experts_per_tok=3,
        moe_intermediate_size=28, num_dense_layers=1, routed_scaling_factor=1.7, **SIZES,
    ),
    "llama": LlamaConfig(attention_bias=True, mlp_bias=True, **SIZES, **rope(LLAMA3, 17)),
    "llama, dynamic": LlamaConfig(**{**SIZES, "max_position_embeddings": 11}, **rope(DYNAMIC)),
    "llama, tied": LlamaConfig(tie_word_embeddings=True, **SIZES, **rope(LINEAR)),
    "ministral": MinistralConfig(sliding_window=5, layer_types=TURNS, **SIZES),
    "ministral3": Ministral3Config(**SIZES, **rope({**YARN, "llama_4_scaling_beta": 0.3}, 5)),
    "mistral": MistralConfig(sliding_window=5, **SIZES, **rope(YARN, 17)),
    "gpt_oss": GptOssConfig(
        num_local_experts=5, num_experts_per_tok=2, sliding_window=5, initializer_range=0.3,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                         "original_max_position_embeddings": 16, "truncate": False},
        **{**WIDE, "intermediate_size": 60},
    ),
    "mixtral": MixtralConfig(num_local_experts=5, num_experts_per_tok=2, sliding_window=5, **WIDE),
    "mpt": MptConfig(attn_config={"softmax_scale": 0.3}, **MPT),
    "mpt, clipped by 0, which is not at all": MptConfig(attn_config={"clip_qkv": 0.0}, **MPT),
    "mpt, clipped": MptConfig(attn_config={"clip_qkv": 0.02}, **MPT),
    "nanochat": NanoChatConfig(**SIZES),
    "nemotron": NemotronConfig(**WIDE, **rope(PARTIAL)),
    "neox": GPTNeoXConfig(**SQUARE, **rope(PARTIAL)),
    "neox, serial": GPTNeoXConfig(use_parallel_residual=False, **SQUARE, **rope(PARTIAL)),
    "olmo": OlmoConfig(clip_qkv=0.7, **WIDE),
    "olmo2": Olmo2Config(**WIDE),
    "olmo3": Olmo3Config(sliding_window=5, **WIDE, **rope(YARN, 17)),
    "olmoe": OlmoeConfig(num_experts=5, num_experts_per_tok=2, **WIDE),
    "opt": OPTConfig(
        hidden_size=42, word_embed_proj_dim=42, ffn_dim=58, num_hidden_layers=3, num_attention_heads=3, vocab_size=97,
        max_position_embeddings=64,
    ),
    "persimmon": PersimmonConfig(**SQUARE, **rope(PARTIAL)),
    "phi": PhiConfig(**WIDE, **rope(PARTIAL)),
    "phi, normed heads": PhiConfig(qk_layernorm=True, **WIDE, **rope(PARTIAL)),
    "phi3": Phi3Config(sliding_window=5, **WIDE, **rope(PARTIAL)),
    "phi3, long": Phi3Config(original_max_position_embeddings=11, **WIDE, **rope(LONG)),
    "phi3, short": Phi3Config(original_max_position_embeddings=23, **WIDE, **rope(LONG)),
    "qwen2": Qwen2Config(use_sliding_window=True, sliding_window=5, max_window_layers=2, **SIZES, **rope(YARN, 17)),
    "qwen2 experts": Qwen2MoeConfig(shared_expert_intermediate_size=20, mlp_only_layers=[1], **MOE),
    "qwen3": Qwen3Config(use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
    "flex_olmo": FlexOlmoConfig(num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, **WIDE),
    "mellum": MellumConfig(sliding_window=5, layer_types=TURNS, **MOE),
    "minimax_m2": MiniMaxM2Config(num_local_experts=6, num_experts_per_tok=3, **WIDE),
    "qwen3 experts": Qwen3MoeConfig(norm_topk_prob=True, **MOE),
    "glm4 experts": Glm4MoeConfig(
        n_routed_experts=6, n_group=3, topk_group=2, routed_scaling_factor=1.7, first_k_dense_replace=1,
        **{**GROUPED, "head_dim": 16},
    ),
    "dots1": Dots1Config(n_routed_experts=6, n_shared_experts=1, first_k_dense_replace=1, **GROUPED),
    "exaone experts": ExaoneMoeConfig(num_experts=5, num_shared_experts=1, first_k_dense_replace=1, **GROUPED),
    "solar experts": SolarOpenConfig(n_routed_experts=7, routed_scaling_factor=2.1, **GROUPED),
    "seed_oss": SeedOssConfig(**SIZES),
    "smollm3": SmolLM3Config(no_rope_layer_interval=2, **WIDE),
    "stablelm": StableLmConfig(use_qkv_bias=True, **WIDE, **rope(PARTIAL)),
    "stablelm, parallel": StableLmConfig(use_parallel_residual=True, **WIDE, **rope(PARTIAL)),
    "starcoder2": Starcoder2Config(sliding_window=5, **WIDE),
    "vaultgemma": VaultGemmaConfig(attn_logit_softcapping=3.0, layer_types=TURNS, **GEMMA),
}  # fmt: skip


def model_of(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A small model of which no weight is neutral."""
    torch.manual_seed(3)
    config = copy.deepcopy(FAMILIES[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(CORRECTIONS):
                buffer.uniform_(-0.3, 0.3)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.25))
    return model.to(dtype).eval()
