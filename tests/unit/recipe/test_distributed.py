"""Shares of processes: the rows of a step, and the base."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.plan.fit import _rows
from veneer.recipe.distributed_part import DistributedPart, with_accumulation
from veneer.recipe.early import refuse_early
from veneer.recipe.recipe import Recipe, parse_recipe


def values(distributed: Any, training: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    part = {"model": {"source": "nowhere/at-all"}, "data": {"train": "rows.jsonl"}, "output": "out"}
    return {**part, "training": training or {}, "distributed": distributed, **more}


@pytest.mark.parametrize(("n", "rows", "steps"), [(1, 3, 12), (2, 3, 6), (4, 3, 3), (3, None, 2)])
def test_accumulation_follows_from_the_rows_of_a_step(
    n: int, rows: int | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(
        values({"global_batch": 36 if rows else 48}, {"per_device_train_batch_size": rows} if rows else {})
    )
    monkeypatch.setattr("veneer.recipe.recipe._n_processes", lambda: n)
    assert recipe.training_config().gradient_accumulation_steps == steps


@pytest.mark.parametrize(
    ("n", "wanted", "training", "message"),
    [
        (
            3,
            64,
            {},
            r"cannot be shared equally by 3 processes × per_device_train_batch_size 8: .* 24\. Take 48 or 72\.",
        ),
        (5, 3, {"per_device_train_batch_size": 2}, r"must be a multiple of 10\. Take 10\."),
        (2, 64, {"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps: the rows .* already \(64\)\. Leave"),
        (2, 64, {"auto_find_batch_size": True}, r"auto_find_batch_size: the rows of a step are set"),
    ],
)
def test_rows_that_cannot_be_dealt_are_refused_early(
    n: int, wanted: int, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_early(values({"global_batch": wanted}, training), n_processes=n)


def test_a_plan_counts_the_micro_batches_of_one_of_several_processes() -> None:
    given = values({"global_batch": 48, "strategy": "fsdp"}, {"max_length": 64})
    found = with_accumulation(given, 3)
    assert found["training"] == {"max_length": 64, "gradient_accumulation_steps": 2}
    assert found["distributed"] == {"strategy": "fsdp"}
    refuse_early(found, n_processes=3)
    assert with_accumulation(values({}), 3) == values({})
    assert with_accumulation(given, 1) == given  # a recipe that is written from it keeps its rows of a step


def test_a_plan_that_fits_changes_no_rows_of_a_step() -> None:
    recipe = parse_recipe(values({"global_batch": 24}))
    given = recipe.training_config(), recipe.distributed, recipe.data
    assert _rows(4, *given) == {"training.per_device_train_batch_size": 4}
    changed = Recipe.model_validate({**recipe.model_dump(), "training": {"per_device_train_batch_size": 4}})
    assert changed.training_config().gradient_accumulation_steps == 6


@pytest.mark.parametrize(
    ("distributed", "more", "message"),
    [
        ({"strategy": "ddp", "shard": 2}, {}, "strategy and shard both say"),
        (
            {"strategy": "zero"},
            {},
            r"distributed\.strategy: 'zero' does not fit: it must be 'auto', 'ddp', 'fsdp' or 'hybrid'",
        ),
        ({"global": 3}, {}, r"distributed\.global: unknown key; the nearest is 'global_batch'"),
        (
            {"shard": 2},
            {"adapter": {"method": "full"}},
            r"full trains every weight.*Leave it out, or distributed\.shard",
        ),
        ({"strategy": "fsdp"}, {"task": "rloo", "rewards": ["exact-match"]}, "rloo generates"),
        (
            {"shard": 3},
            {"metric": {"name": "exact-match"}, "data": {"train": "rows.jsonl", "eval": "held.jsonl"}},
            r"metric\.name: exact-match generates text.*set it to 'labels'.* or distributed\.shard",
        ),
        (
            {"strategy": "fsdp"},
            {"training": {"ddp_find_unused_parameters": True, "ddp_broadcast_buffers": True}},
            r"(?s)ddp_find_unused_parameters: it is a setting of DDP, .*ddp_broadcast_buffers: it is a setting of DDP",
        ),
        ({"strategy": "fsdp"}, {"training": {"activation_offloading": "disk"}}, "activation_offloading: it needs"),
        (
            {"strategy": "hybrid"},
            {"training": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            r"use_reentrant=True would gather .* or distributed\.strategy\.",
        ),
    ],
)
def test_a_base_that_cannot_be_cut_is_refused_early(
    distributed: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_early({**values(distributed), **more})


def test_a_copy_of_the_base_is_shared_by_all_or_by_a_machine() -> None:
    wanted = {"ddp": [1], "fsdp": [8], "hybrid": [4], "auto": [1, 4, 8]}
    found = {each: DistributedPart.model_validate({"strategy": each}).copy_sizes(8, 4) for each in wanted}
    assert found == wanted
    assert DistributedPart(strategy="auto").copy_sizes(4, 4) == [1, 4]
    assert DistributedPart(strategy="auto").copy_sizes(11, 4) == [1, 11]
    assert [DistributedPart(strategy=each).copy_size(8, 4) for each in ("ddp", "hybrid", "fsdp")] == [1, 4, 8]
    assert DistributedPart(strategy="auto").copy_size(1, 1) == 1
    with pytest.raises(ConfigError, match=r"auto chooses by the plan.* Say ddp, hybrid or fsdp"):
        DistributedPart(strategy="auto").copy_size(4, 4)
    assert DistributedPart(shard=2).copy_sizes(8, 4) == [2]
    assert DistributedPart(strategy="auto", global_batch=5).with_copy_size(4) == DistributedPart(
        shard=4, global_batch=5
    )
    DistributedPart(strategy="hybrid").require_layout(8, 4)
    DistributedPart(shard=4).require_layout(8, 4)
    with pytest.raises(ConfigError, match=r"shard: 3 must divide the 8 processes of this run. Take one of 1, 2, 4, 8,"):
        DistributedPart(shard=3).require_layout(8, 4)
    with pytest.raises(ConfigError, match="hybrid on one machine is the same as fsdp"):
        DistributedPart(strategy="hybrid").require_layout(4, 4)
