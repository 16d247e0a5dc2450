"""Tiny models with a size of its own for every axis, on disk, and recipes that train them."""

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


def made(folder: Path, n_blocks: int) -> Path:
    torch.manual_seed(3)
    config = llama_config(hidden_size=48, head_dim=16, num_hidden_layers=n_blocks, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, both of which are traced: what is planned of a deeper model is in ``test_depth.py``."""
    return made(tmp_path_factory.mktemp("tiny"), 2)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, of which two and three stand for all."""
    return made(tmp_path_factory.mktemp("deep"), 5)


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
