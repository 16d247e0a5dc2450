"""Text halves of models with images: found, described, and fused on rows of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tests.unit.model.conftest import SIZES
from tests.unit.model.steps import BATCHES, IDS, adapted, error, step
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4vMoeConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

from veneer.model.blueprint.describe import blocks_of, describe
from veneer.model.fused.decoder import fused, is_fused

TEXT = {**SIZES, "pad_token_id": 0}
TOWER: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}
MARKS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 2, 2]}


def configs() -> Iterator[PreTrainedConfig]:
    yield LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_index=96)
    yield Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER), text_config=Gemma3TextConfig(sliding_window=7, **TEXT),
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 42,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": AXES}
    yield Qwen3VLConfig(vision_config=vision, text_config=text, **MARKS)
    yield Qwen3VLMoeConfig(vision_config=vision, text_config={**text, **EXPERTS, "num_experts": 5}, **MARKS)
    yield Glm4vMoeConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        text_config={
            **TEXT, **EXPERTS, "head_dim": 16, "n_routed_experts": 6, "first_k_dense_replace": 1,
            "rope_parameters": {**AXES, "mrope_section": [2, 1, 1]},
        }, **MARKS,
    )  # fmt: skip


def test_the_text_half_of_a_model_with_images_fuses_on_text(halves: list[str]) -> None:
    for config in configs():
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config, experts_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.25))
        holder, layers = blocks_of(adapted(model))
        assert holder is model.base_model.language_model
        described = describe(model)
        assert not described.strange, config.model_type
        assert [block.path for block in described.blocks] == [f"model.language_model.layers.{k}" for k in range(2)]
        batch: dict[str, Any] = dict(BATCHES["padded"])
        batch |= {"token_type_ids": torch.zeros_like(IDS)} if config.model_type == "gemma3" else {}
        expected = step(model, batch)
        with fused(model) as takes:
            halves.clear()
            found = step(model, batch)
        assert takes
        assert not is_fused(model)
        assert len(halves) == 2 * len(layers), config.model_type
        assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm(), config.model_type
        assert error(found[2], expected[2]) <= 5e-5, config.model_type
