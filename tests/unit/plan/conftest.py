"""A tiny model with a size of its own for every axis, on disk, and recipes that train it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import llama_config
from transformers import LlamaForCausalLM

from veneer.recipe.recipe import Recipe, parse_recipe

Make = Callable[..., Recipe]
HELD_OUT = "per_device_eval_batch_size"
"""Rows are held out where their number is given."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "model"
    torch.manual_seed(3)
    config = llama_config(hidden_size=48, head_dim=16, num_hidden_layers=5, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Make:
    def make(adapter: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any) -> Recipe:
        return parse_recipe(
            {
                "model": {"source": str(tiny), **(model or {})},
                "data": {"train": "rows.jsonl", **({"eval": "held.jsonl"} if HELD_OUT in training else {})},
                "adapter": adapter or {"method": "lora", "r": 5},
                "training": {"per_device_train_batch_size": 3, "max_length": 23, **training},
                "output": str(tmp_path / "run"),
            }
        )

    return make
