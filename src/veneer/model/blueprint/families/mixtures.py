"""Mixtures of experts, chosen and weighted by a softmax over scores: Mixtral, Qwen, OLMoE, Granite, gpt-oss."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"), experts="softmax")
