"""The base of a recipe: what is left in memory of the file that it was made of."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from veneer.model.memory.give_back import SMAPS
from veneer.recipe.parts import ModelPart
from veneer.train.base_model import load_base


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_experts_that_were_joined_are_not_held_beside_their_file(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=131, hidden_size=192, intermediate_size=360, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5,
    )  # fmt: skip
    torch.manual_seed(7)
    made = MixtralForCausalLM(config)
    made.save_pretrained(tmp_path)
    model = load_base(ModelPart(source=str(tmp_path)))
    file = tmp_path / "model.safetensors"
    maps = psutil.Process().memory_maps(grouped=False)
    assert sum(place.rss for place in maps if place.path == str(file)) < 0.1 * file.stat().st_size
    for name, parameter in made.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
