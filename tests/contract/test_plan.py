"""Every method on storage formats: declared bytes are those planned and those that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import llama_config
from transformers import LlamaForCausalLM

from bench.training.measured import measured_model
from veneer.ops.traced import tracing
from veneer.plan.architecture import config_of
from veneer.plan.memory_trace import kinds_of
from veneer.plan.model import traced_model
from veneer.recipe.adapter import names_of
from veneer.recipe.methods import imported
from veneer.recipe.recipe import parse_recipe

NEEDED: dict[str, dict[str, Any]] = {
    "prefix_tuning": {"num_virtual_tokens": 7},
    "qalora": {"qalora_group_size": 4, "target_modules": ["q_proj", "o_proj"]},
    "prompt_tuning": {"num_virtual_tokens": 7},
    "multitask_prompt_tuning": {"num_virtual_tokens": 7, "num_tasks": 3, "num_ranks": 2},
    "p_tuning": {"num_virtual_tokens": 7, "encoder_hidden_size": 11},
    "adaption_prompt": {"adapter_len": 7, "adapter_layers": 1},
    "cartridge": {"num_virtual_tokens": 7, "num_frozen_tokens": 2},
    "cpt": {"cpt_token_ids": [5, 61, 2], "cpt_tokens_type_mask": [1, 2, 4]},
    "adalora": {"total_step": 12},
    "trainable_tokens": {"token_indices": [3, 5]},
}
FORMATS = ("nf4", "fp4", "int8")
CASES = [
    (method, kind)
    for place, method in enumerate(names_of(imported().methods))
    for kind in ("none", FORMATS[place % len(FORMATS)])
    if method != "full" or kind == "none"  # codes are not trained
]
"""Each method on a dense base and on one format in turn: a coded layer is one class, whatever its format."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "model"
    torch.manual_seed(5)
    LlamaForCausalLM(llama_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


def bytes_by_kind(model: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    seen: set[int] = set()
    for tensor, kind in kinds_of(model):
        storage = getattr(tensor, "bare", tensor).untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found[kind] = found.get(kind, 0) + storage.nbytes()
    return found


@pytest.mark.parametrize(("method", "quantization"), CASES)
def test_declared_bytes_are_planned_bytes_and_real_ones(
    method: str, quantization: str, own_settings: dict[str, Any], shapes_from_weight: bool, base: Path
) -> None:
    recipe = parse_recipe(
        {
            "model": {"source": str(base), "quantization": quantization},
            "data": {"train": "rows.jsonl"},
            "adapter": {"method": method, **own_settings, **NEEDED.get(method, {})},
            "output": "run",
        }
    )
    real = measured_model(recipe)
    with tracing():
        planned = traced_model(config_of(str(base)), recipe.model, recipe.adapter_config())
    assert bytes_by_kind(planned) == bytes_by_kind(real)
    shapes = [
        {n: (tuple(p.shape), p.dtype) for n, p in m.named_parameters() if p.requires_grad} for m in (planned, real)
    ]
    assert shapes_from_weight or shapes[0] == shapes[1]
