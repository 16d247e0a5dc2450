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


LATENT = {"deepseek_v3", "glm4_moe_lite"}


def test_every_listed_model_type_is_tested() -> None:
    """Types with latent attention are not described whole: tests of fused halves compare their experts."""
    assert {config.model_type for config in FAMILIES.values()} | LATENT == set(families_by_type())
