"""Blocks of every described family beside the model's own code, and the types that fuse whole."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tests.unit.model.blueprint.families import FAMILIES, SIZES, WIDE
from tests.unit.model.conftest import base
from tests.unit.model.steps import BATCHES, adapted, error, step
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeLiteConfig,
    Ministral3Config,
    OlmoConfig,
    PreTrainedConfig,
)

from veneer import LoraConfig
from veneer.model.blueprint.describe import blocks_of, describe, describe_config
from veneer.model.fused.decoder import fuse_as_described, fused
from veneer.model.program.halves import BlockProgram, block_program
from veneer.ops.traced import tracing
from veneer.plan.model import make_traced

DROPOUTS = ("dropout", "residual_dropout")
TYPES: dict[str, PreTrainedConfig] = {
    **FAMILIES,
    "olmo": OlmoConfig(**WIDE),
    "olmo, clipped": FAMILIES["olmo"],
    "ministral3, in its context": Ministral3Config(
        rope_parameters={"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 64, "rope_theta": 1e4},
        **SIZES,
    ),
}
NEW = [
    "bloom", "bloom, 3 heads", "cohere", "cohere, normed heads", "cohere2", "ernie4_5", "exaone4", "falcon",
    "falcon, groups", "falcon, groups, one norm", "falcon, all heads, serial", "glm", "glm4", "gptj",
    "gptj, whole heads", "granite", "helium", "hunyuan", "hunyuan experts", "hyperclovax", "mpt", "nanochat",
    "nemotron", "olmo", "olmo, clipped", "olmo2", "olmo3", "opt", "qwen2 experts",
    "qwen3 experts", "smollm3", "solar experts", "dots1", "exaone experts",
    "glm4 experts", "gpt_oss", "vaultgemma",
]  # fmt: skip
BY_MASK = ("bloom", "bloom, 3 heads", "gpt_oss", "mpt", "opt")  # their own masks take no positions
BORDERS = {"cohere, normed heads": "attention", "olmo, clipped": "attention"}


def config_of(family: str) -> PreTrainedConfig:
    config = copy.deepcopy(TYPES[family])
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


@pytest.mark.parametrize("family", NEW)
def test_a_family_fuses_up_to_its_borders_and_equals_its_own_code(family: str, halves: list[str]) -> None:
    """Interleaved rotation or none, norms behind halves alone or without weights, multipliers, experts."""
    model = adapted(base(config_of(family)))
    batch = BATCHES["padded" if family in BY_MASK else "packed"]
    expected = step(model, batch)
    with fused(model) as takes:
        halves.clear()
        found = step(model, batch)
    assert takes
    n_blocks = len(blocks_of(model)[1])
    assert halves.count("mlp") == n_blocks
    assert halves.count("attention") == (0 if BORDERS.get(family) == "attention" else n_blocks)
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert error(found[2], expected[2]) <= 5e-5


def test_a_bias_that_is_rounded_leaves_the_model_to_its_own_code(caplog: pytest.LogCaptureFixture) -> None:
    """Falcon's forward adds it to a mask of its own; the plan says the same."""
    model = base(config_of("falcon, by positions"))
    with fused(model) as takes:
        assert not takes
    assert "adds a bias by position that is rounded" in caplog.text
    with tracing():
        make_traced(model)
        assert "adds a bias by position that is rounded" in str(fuse_as_described(model))


@pytest.mark.parametrize("kind", [DeepseekV3Config, Glm4MoeLiteConfig])
def test_halves_of_kinds_that_no_kernel_has_leave_the_others_fused(
    kind: type[PreTrainedConfig], halves: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Latent attention: only the second halves are fused, the dense one of the first block and experts."""
    ranks = {"q_lora_rank": 21, "kv_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 14}
    sizes = {**WIDE, "num_hidden_layers": 2, "num_key_value_heads": 6, "head_dim": 6}
    experts = {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
    }
    dense = {"first_k_dense_replace": 1} if kind is DeepseekV3Config else {}
    config = kind(**sizes, **ranks, **experts, **dense)
    model = adapted(base(config), LoraConfig(r=5, target_modules="all-linear"))
    expected = step(model, BATCHES["padded"])
    with caplog.at_level(logging.INFO, logger="veneer"), fused(model) as takes:
        halves.clear()
        found = step(model, BATCHES["padded"])
    assert takes
    assert halves == ["mlp", "mlp"]
    assert "run transformers' code, not fused kernels: it has no q, k, v and o projections" in caplog.text
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert error(found[2], expected[2]) <= 5e-5


def test_a_type_that_nobody_listed_shows_that_it_turns_neighbours(halves: list[str]) -> None:
    """A plan, which sees no values, and the run fuse the same halves."""
    config = Ernie4_5_MoeConfig(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=28, moe_num_shared_experts=1, moe_layer_start_index=1, **WIDE
    )
    model = adapted(base(config))
    with fused(model) as takes:
        assert takes
        run = [block.fused_program for block in blocks_of(model)[1]]
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(config)
    planned.requires_grad_(False).tie_weights()
    shapes = [block_program(block, WIDE["hidden_size"]) for block in describe(planned).blocks]
    assert all(isinstance(shape, BlockProgram) for shape in shapes)
    for shape, own in zip(shapes, run, strict=True):
        assert (own.attention is None, own.mlp is None) == (shape.attention is None, shape.mlp is None)
    assert all(program.attention is not None and program.rotary.interleaved for program in run)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_hooked_block_runs_its_own_code_with_its_own_mask_and_bias(family: str, halves: list[str]) -> None:
    model = adapted(base(config_of(family)))
    expected = step(model, BATCHES["padded"])
    with fused(model) as takes:
        for part in blocks_of(model)[1][1].children():
            part.register_forward_hook(lambda module, args, output: output)
        halves.clear()
        found = step(model, BATCHES["padded"])
    assert takes
    assert halves.count("attention") == len(blocks_of(model)[1]) - 1
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert error(found[2], expected[2]) <= 5e-5


@pytest.mark.parametrize("family", ["cohere2", "granite", "olmo2"])
def test_in_bfloat16_they_err_no_more_than_twice_their_own_code(family: str) -> None:
    model = adapted(base(config_of(family), torch.bfloat16))
    exact = step(copy.deepcopy(model).double(), BATCHES["packed"])
    general = step(model, BATCHES["packed"])
    with fused(model):
        found = step(model, BATCHES["packed"])
    assert (found[0] - exact[0]).norm() <= 2 * (general[0] - exact[0]).norm()
    assert error(found[2], exact[2]) <= 2 * error(general[2], exact[2])


def test_all_listed_types_fuse_whole() -> None:
    whole: dict[str, bool] = {}
    for family in TYPES:
        shapes: list[Any] = [block_program(block, 1) for block in describe_config(config_of(family)).blocks]
        fits = all(isinstance(shape, BlockProgram) and shape.attention and shape.mlp for shape in shapes)
        whole[TYPES[family].model_type] = whole.get(TYPES[family].model_type, False) or fits
    assert len(whole) == 58
    assert not {name for name, fits in whole.items() if not fits}
