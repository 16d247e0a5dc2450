"""Advice as numbers of a recipe, sizes with units, bytes a rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.plan.conftest import Make

from veneer.cli.plan_options import bytes_from
from veneer.errors import ConfigError
from veneer.plan.advice import TASKS, advise
from veneer.plan.cards import CARDS, card_of
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import ACTIVATIONS, BASE
from veneer.plan.plan import plan_recipe
from veneer.plan.processes import copy_sizes, cut_over
from veneer.recipe.distributed_part import DistributedPart

LLAMA_3_8B = 41_943_040 // 16


def test_rank_follows_tokens_and_task() -> None:
    values = {task: advise(task, 100_000, 400, LLAMA_3_8B)[1].value for task in ("instruction", "code", "rl")}
    assert values == {"instruction": 16, "code": 256, "rl": 8}
    wins = advise("pretraining", 40_000_000, 500, LLAMA_3_8B)[1]
    assert wins.value == 256
    assert "full fine-tuning wins" in wins.reason
    assert all(each.source and each.confidence in ("high", "medium", "low") for each in advise("math", 7, 11, 13))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n_rows", [3, 211, 7_919, 104_729])
def test_the_reasons_name_the_numbers_that_they_lead_to(task: str, n_rows: int) -> None:
    found = {each.key.partition(".")[2]: each for each in advise(task, n_rows, 7, LLAMA_3_8B)}
    rate, batch, epochs = (found[key] for key in ("learning_rate", "per_device_train_batch_size", "num_train_epochs"))
    assert f"ten times the usual rate of full fine-tuning in {task}, {rate.value / 10:g}" in rate.reason
    assert {3: 1, 211: 10, 7_919: 32, 104_729: 32}[n_rows] == batch.value
    assert ("32 rows or fewer" if batch.value == 32 else f"at most 1/20 of the {n_rows} rows") in batch.reason
    assert epochs.value == (1 if task == "pretraining" else {3: 3, 211: 3, 7_919: 2, 104_729: 1}[n_rows])
    assert ("read once" if task == "pretraining" else "3 epochs up to 5,000, 2 up to 50,000, 1 above") in epochs.reason


def test_experts_that_are_left_out_take_the_confidence_from_the_targets() -> None:
    whole, cut = ({a.key: a for a in advise("math", 7, 11, 13, left)} for left in (None, "the experts are not adapted"))
    assert [each["adapter.target_modules"].confidence for each in (whole, cut)] == ["high", "low"]
    assert "here the experts are not adapted" in cut["adapter.target_modules"].reason


def test_unknown_tasks_and_counts_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--task 'chat'.*--rows=0 must be at least 1"):
        advise("chat", 0, 1, 1)


@pytest.mark.parametrize(("text", "n"), [("24GB", 24_000_000_000), ("1.5 GiB", 1_610_612_736), ("500mb", 500_000_000)])
def test_sizes_are_read_with_their_units(text: str, n: int) -> None:
    assert bytes_from(text, "--fit") == n


@pytest.mark.parametrize("text", ["24 parsecs", "-3GB", "0GB", "GB", "10", ""])
def test_nonsense_units_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fit .* is no size"):
        bytes_from(text, "--fit")


def test_ranks_hold_copies_or_shards(recipe: Make) -> None:
    plan = plan_recipe(recipe())
    assert cut_over(plan, 1, 1).peak.n_bytes == plan.peak.n_bytes
    assert cut_over(plan, 4, 1).peak.n_bytes == plan.peak.n_bytes + 4 * plan.n_trained
    shard = cut_over(plan, 4, 4).peak
    assert shard.kinds["base"] == -(-plan.peak.kinds["base"] // 4)
    for kind in ("activations", "embeddings", "head", "adapters", "gradients", "optimizer state"):
        assert shard.kinds.get(kind) == plan.peak.kinds.get(kind), kind  # whatever trains stays whole


@pytest.mark.parametrize(
    ("part", "sizes"), [({}, [1]), ({"strategy": "fsdp"}, [6]), ({"shard": 3}, [3]), ({"strategy": "auto"}, [1, 6])]
)
def test_a_plan_counts_the_base_as_the_recipe_shares_it(part: dict[str, Any], sizes: list[int]) -> None:
    assert copy_sizes(DistributedPart.model_validate(part), 6) == sizes


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"strategy": "hybrid"}, r"hybrid depends on the machines .* Give --shard N"),
        ({"shard": 4}, "shard: 4 must divide the 6 processes"),
    ],
)
def test_a_plan_refuses_what_it_cannot_count(part: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        copy_sizes(DistributedPart.model_validate(part), 6)


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("h100", "h100-80gb"),
        ("H200", "h200"),
        ("NVIDIA H100 80GB", "h100-80gb"),
        ("a100_40gb", "a100-40gb"),
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("l4", "l4"),
        ("l40s", "l40s"),
    ],
)
def test_a_card_goes_by_whole_words_of_its_name(name: str, means: str) -> None:
    assert card_of(name) is CARDS[means]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a100", "'a100' means a100-40gb or a100-80gb: give one of them"),
        ("RTX", "'RTX' means rtx-3090 or rtx-4090"),
        ("l40", "'l40' must be one of .*; the nearest is 'l40s'"),
        ("a10", "'a10' must be one of .*; the nearest is 'a10g'"),
        ("40gb", "'40gb' must be one of"),
        ("", "'' must be one of"),
    ],
)
def test_a_name_that_means_no_card_or_several_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"card {told}"):
        card_of(name)


def test_a_rank_peaks_in_the_phase_that_is_largest_once_weights_are_shards(recipe: Make, deep: Path) -> None:
    phases = {"load": Peak({BASE: 70_001}), "backward": Peak({BASE: 11_003, ACTIVATIONS: 50_021})}
    plan = replace(plan_recipe(recipe(None, {"source": str(deep)})), phases=phases)
    assert plan.peak_phase == "load"
    assert cut_over(plan, 1000, 1000).peak.kinds[ACTIVATIONS] == 50_021
