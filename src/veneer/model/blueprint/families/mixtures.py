"""Mixtures of experts, chosen and weighted by a softmax over scores: Mixtral, Qwen, OLMoE, Granite, gpt-oss, Mellum."""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=(
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_next", "qwen3_5_moe",
        "qwen3_5_moe_text", "olmoe", "flex_olmo", "granitemoe", "gpt_oss", "mellum",
    ),
    experts="softmax",
)  # fmt: skip
