"""Depth from two shallow traces is that of one of all blocks, whatever the pattern in which they repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.plan.conftest import Make
from transformers import Gemma3TextConfig, PreTrainedConfig

from veneer.plan import depth
from veneer.plan import plan as planning
from veneer.plan.depth import Pattern, between, pattern_of
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import ACTIVATIONS, BASE, trace
from veneer.plan.model import traced_model
from veneer.plan.plan import plan_recipe


def gemma(n_blocks: int, period: int) -> Gemma3TextConfig:
    types = ["full_attention" if k % period == period - 1 else "sliding_attention" for k in range(n_blocks)]
    return Gemma3TextConfig(
        vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=n_blocks, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, sliding_window=7, max_position_embeddings=64, layer_types=types,
        dtype=torch.bfloat16,
    )  # fmt: skip


def depths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of blocks that are traced, each time."""
    found: list[int] = []

    def counted(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        found.append(config.get_text_config().num_hidden_layers)
        return trace(config, *args, **kwargs)

    monkeypatch.setattr(planning, "trace", counted)
    return found


@pytest.mark.parametrize(
    ("n_blocks", "lead", "period", "wanted"),
    [
        (80, 0, 1, (2, 3)), (62, 0, 6, (8, 14)), (34, 0, 6, (10, 16)), (46, 0, 2, (2, 4)), (27, 1, 1, (2, 3)),
        (3, 0, 1, (3,)), (1, 0, 1, (1,)), (12, 0, 6, (12,)), (29, 3, 4, (9, 13)),
    ],
)  # fmt: skip
def test_few_blocks_stand_for_all(n_blocks: int, lead: int, period: int, wanted: tuple[int, ...]) -> None:
    assert Pattern(n_blocks, lead, period).depths == wanted


def test_a_whole_and_its_shallow_stand_in_end_in_the_same_blocks() -> None:
    pattern = Pattern(23, 3, 4)
    assert pattern.depths == (7, 11)
    deep, shallow = pattern.places(23), pattern.places(7)
    assert deep[0] == ["first 0"]
    assert deep[22] == ["last 0"]
    assert shallow[6] == ["first 6", "last 0"]
    assert sorted(name for names in deep.values() for name in names) == sorted(
        name for names in shallow.values() for name in names
    )


def test_a_group_of_windows_and_full_attention_is_traced_twice(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, config, found = recipe(), gemma(7, 2), depths(monkeypatch)
    short = plan_recipe(wanted, config=config)
    assert found == [3, 5]
    whole = plan_recipe(wanted, config=config, whole=True)
    assert found == [3, 5, 7]
    assert {phase: peak.n_bytes for phase, peak in short.phases.items()} == {
        phase: pytest.approx(peak.n_bytes, rel=2e-3) for phase, peak in whole.phases.items()
    }
    assert short.held == whole.held
    assert (short.n_trained, short.n_parameters) == (whole.n_trained, whole.n_parameters)
    assert short.work.flops == pytest.approx(whole.work.flops)
    assert short.work.n_ops == pytest.approx(whole.work.n_ops)


def test_blocks_that_are_recomputed_by_turns_are_a_group(recipe: Make) -> None:
    wanted = recipe(gradient_checkpointing="selective", gradient_checkpointing_kwargs={"every_n_layers": 2})
    config = gemma(7, 1)
    assert pattern_of(wanted, config, 7) == Pattern(7, 0, 2)
    short, whole = plan_recipe(wanted, config=config), plan_recipe(wanted, config=config, whole=True)
    assert short.peak.n_bytes == pytest.approx(whole.peak.n_bytes, rel=2e-3)


def test_adapters_of_the_first_blocks_alone_are_a_lead(recipe: Make) -> None:
    wanted, config = recipe({"method": "lora", "r": 5, "layers_to_transform": [0, 2]}), gemma(7, 1)
    assert pattern_of(wanted, config, 7) == Pattern(7, 3, 1)
    short, whole = plan_recipe(wanted, config=config), plan_recipe(wanted, config=config, whole=True)
    assert short.peak.n_bytes == pytest.approx(whole.peak.n_bytes, rel=2e-3)
    assert short.n_trained == whole.n_trained


def test_nothing_repeats_where_the_last_block_differs(recipe: Make) -> None:
    wanted = recipe({"method": "lora", "r": 5, "layers_to_transform": [4]})
    assert pattern_of(wanted, gemma(5, 1), 5) == Pattern(5, 0, 5)


def test_blocks_that_read_keys_of_others_are_all_traced(recipe: Make) -> None:
    config = gemma(9, 1)
    config.num_kv_shared_layers = 4
    assert pattern_of(recipe(), config, 9).depths == (9,)


def test_the_whole_model_is_built_once_for_batches_that_differ(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def counted(config: PreTrainedConfig, *args: Any) -> Any:
        built.append(config.num_hidden_layers)
        return traced_model(config, *args)

    monkeypatch.setattr(depth, "traced_model", counted)
    config = gemma(8, 1)
    for rows in (3, 5):
        pattern_of(recipe(per_device_train_batch_size=rows), config, 8)
    assert built == [8]
    pattern_of(recipe({"method": "lora", "r": 7}), config, 8)
    assert built == [8, 8]


def test_no_kind_is_below_zero_at_the_whole_depth() -> None:
    low, high = Peak({BASE: 700, ACTIVATIONS: 40}), Peak({BASE: 1100, ACTIVATIONS: 25})
    assert between(low, high, 3).kinds == {BASE: 1900}
    assert between(low, high, 2).kinds == {BASE: 1500, ACTIVATIONS: 10}


def test_all_blocks_are_traced_if_layers_are_counted_from_the_top(recipe: Make) -> None:
    wanted = recipe({"method": "adaption_prompt", "adapter_len": 3, "adapter_layers": 4})
    assert pattern_of(wanted, gemma(7, 1), 7) == Pattern(7, 0, 7)
