"""Facts that a description reads from the code around a model's layers, on tiny models without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_configs import tiny_config
from tests.tiny_types import tiny_class

from veneer.model.blueprint.describe import describe
from veneer.model.modules.snapshot import look_at
from veneer.model.sites.virtual_tokens import inner_model
from veneer.plan.serving import kept_in_serving


def empty(model_type: str) -> Any:
    with torch.device("meta"):
        return tiny_class(model_type).from_config(tiny_config(model_type), dtype=torch.float32).eval()


@pytest.mark.looped(("name", "interleaved"), [("qwen2_vl", False), ("qwen3_vl", False), ("glm4v", True)])
def test_a_text_half_turns_by_its_own_frequencies_and_not_by_a_towers(name: str, interleaved: bool) -> None:
    part: Any = describe(empty(name)).blocks[0].attention
    assert part.rotary.dim == part.heads.head_dim
    assert part.rotary.interleaved == interleaved


@pytest.mark.looped(
    ("name", "reason"),
    [
        ("beam", "its forward calls depth_scaled_residual_add, which the model description does not cover"),
        ("classes/eurobert", "it attends to later tokens too"),
    ],
)
def test_what_a_block_does_beyond_its_parts_is_read_from_its_code(name: str, reason: str) -> None:
    assert reason in [part.reason for part in describe(empty(name)).blocks[0].strange]


@pytest.mark.looped(
    ("name", "layer"), [("longcat_flash", "router.classifier"), ("gemma3n_text", "altup.correction_coefs")]
)
def test_a_layer_whose_weight_other_code_multiplies_is_no_target(name: str, layer: str) -> None:
    index = look_at(empty(name)).index()
    assert any(path.endswith(layer) for path in index.adaptable)
    assert not any(path.endswith(layer) for path in index.all_linear)


@pytest.mark.looped(("name", "position"), [("hrm_text", 2048), ("dory", 8), ("dbrx", 128)])
def test_a_plan_counts_what_code_keeps_that_runs_twice_has_no_cache_or_reads_indices(name: str, position: int) -> None:
    """A layer that runs twice a pass has no pages; code that fails with a cache keeps the tokens alone."""
    assert kept_in_serving(empty(name))[0].position == position


def test_the_inner_model_of_a_text_half_with_a_head_is_without_it() -> None:
    assert inner_model(empty("kosmos-2.5")).get_output_embeddings() is None
