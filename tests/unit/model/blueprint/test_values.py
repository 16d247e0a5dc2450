"""Descriptions are whole: run from them alone, a model of every family gives the logits that transformers gives."""

from __future__ import annotations

import pytest
import torch

from veneer.model.blueprint.describe import describe, describe_config
from veneer.model.blueprint.registry import families_by_type

from .families import FAMILIES, model_of
from .interpreter import logits

IDS = (torch.arange(2 * 13).view(2, 13) * 31 + 5) % 97


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_the_description_alone(family: str) -> None:
    model = model_of(family)
    decoder = describe_config(FAMILIES[family])
    assert decoder == describe(model)
    with torch.no_grad():
        expected = model(IDS).logits
        found = logits(
            decoder, {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}, IDS
        )
    assert (found - expected).norm() <= 5e-6 * expected.norm()  # transformers' norms and tables are float32's


# Their fused halves are compared with transformers' own code: experts beside latent attention, text halves, hybrids.
ELSEWHERE = {
    *("deepseek_v3", "glm4_moe_lite"),
    *("glm4v_moe", "glm4v_moe_text", "hunyuan_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
    *("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
}


def test_every_listed_model_type_is_tested() -> None:
    assert {config.model_type for config in FAMILIES.values()} | ELSEWHERE == set(families_by_type())
