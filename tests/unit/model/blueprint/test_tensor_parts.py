"""The part of a model that each tensor of a checkpoint belongs to."""

from __future__ import annotations

import re

import pytest

from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.tensor_parts import part_of

from .families import FAMILIES, model_of

# Patterns that hold for the families here, written anew.
ATTENTION = r"\.(self_attn|self_attention|attention|attn|conv)\."


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_has_its_part(family: str) -> None:
    decoder = describe_config(FAMILIES[family])
    for name, parameter in model_of(family).named_parameters():
        part = part_of(name, decoder)
        if "norm" in name or ".ln_" in name:
            assert part == "norms", name
        elif re.search(r"lm_head|embed_out", name):
            assert part == "output head", name
        elif re.search(ATTENTION, name):
            assert part == "attention", name
        elif re.search(r"layers\.|\.h\.|blocks\.", name):
            assert part == "feed-forward", name
        else:
            assert part == "embeddings", name
            assert parameter.ndim == 2


def test_a_checkpoint_without_the_first_name_of_its_paths() -> None:
    decoder = describe_config(FAMILIES["gpt2"])
    names = ("h.0.attn.c_attn.weight", "h.1.mlp.c_proj.bias", "h.0.ln_1.bias", "wpe.weight", "elsewhere.weight")
    assert [part_of(name, decoder) for name in names] == ["attention", "feed-forward", "norms", "embeddings", "other"]
