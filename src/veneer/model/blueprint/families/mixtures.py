"""Mixtures of experts, chosen and weighted by a softmax over the router's scores: Mixtral, Qwen, OLMoE, Granite."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"), experts="softmax")
