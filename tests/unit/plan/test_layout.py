"""Memory and traffic of several processes by layout, and the layout that ``auto`` takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.plan.conftest import Make

from veneer.errors import ConfigError
from veneer.plan.cards import card_of
from veneer.plan.layout import Ranks, rank_facts, told_ranks
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import BASE, EMBEDDINGS, GRADIENTS
from veneer.plan.model import shortened
from veneer.plan.plan import Plan, plan_recipe
from veneer.plan.processes import cut_over
from veneer.plan.report import CONTEXT_BYTES, FRAGMENTS, Machine
from veneer.recipe.recipe import Recipe, parse_recipe

BLOCKS, HEAD, GRADS, N_TRAINED = 70_000_000_000, 2_000_000_000, 84_000_000, 21_000_000


@pytest.fixture(scope="module")
def plan(tiny: Path) -> Plan:
    """A base of 70 GB in 80 blocks, in which three micro-batches make a step."""
    values = {
        "model": {"source": str(tiny)}, "data": {"train": "rows.jsonl"}, "output": "run",
        "training": {"gradient_accumulation_steps": 3, "max_length": 23},
    }  # fmt: skip
    found = plan_recipe(parse_recipe(values))
    held = Peak({BASE: BLOCKS, EMBEDDINGS: HEAD})
    config = shortened(found.config, 80)
    return replace(
        found,
        config=config,
        held=held,
        phases={"optimizer": Peak({**held.kinds, GRADIENTS: GRADS})},
        n_trained=N_TRAINED,
    )


def _laid_out(plan: Plan, part: dict[str, Any]) -> Plan:
    values = {**plan.recipe.model_dump(exclude_unset=True), "distributed": part}
    return replace(plan, recipe=Recipe.model_validate(values))


def _of_card(n_bytes: float) -> Machine:
    return Machine(replace(card_of("l4"), n_bytes=int(n_bytes)), timed=False)


def _bytes(shard: int) -> int:
    """Return the bytes of one process, by hand."""
    gathered = 0 if shard == 1 else 3.6 * BLOCKS / 80
    tensors = BLOCKS / shard + HEAD + GRADS + 4 * N_TRAINED + gathered
    return round(FRAGMENTS * tensors + CONTEXT_BYTES)


@pytest.mark.parametrize(
    ("room", "shard", "reason"),
    [
        (_bytes(1) + 9, 1, r"^a process with a whole base takes 76\.28 GB, and 76\.28 GB may be taken$"),
        (_bytes(1) - 9, 6, r"whole base takes 76\.28 GB.*machines of 2 devices or more, hybrid fits"),
        (_bytes(6) + 9, 6, r"may be taken$"),
        (_bytes(6) - 9, 6, "no layout fits"),
    ],
)
def test_auto_takes_the_first_layout_that_fits(plan: Plan, room: int, shard: int, reason: str) -> None:
    facts = rank_facts(_laid_out(plan, {"strategy": "auto"}), _of_card(room), Ranks(6), None)
    assert (facts["auto"]["shard"], facts["shard"], facts["strategy"]) == (shard, shard, {1: "ddp", 6: "fsdp"}[shard])
    assert re.search(reason, facts["auto"]["reason"])
    sizes = {each["shard"]: each for each in facts["layouts"]}
    assert list(sizes) == [1, 2, 3, 6]
    for each, layout in sizes.items():
        assert layout["process"] == pytest.approx(_bytes(each), abs=9)
        assert layout["fits"] == (layout["process"] <= room)


def test_a_step_receives_blocks_twice_a_micro_batch_and_its_gradients_once(plan: Plan) -> None:
    cut = _laid_out(plan, {"shard": 3})
    facts = rank_facts(cut, _of_card(90e9), Ranks(6, 5e9), 1.5)
    blocks, gradients = 2 * 3 * BLOCKS * 2 // 3, 2 * GRADS * 5 // 6
    assert facts["traffic"] == {"gathers": blocks, "gradients": gradients, "received": blocks + gradients}
    assert facts["seconds"] == {"computing": 4.5, "gathers": blocks / 5e9, "gradients": gradients / 5e9}
    lines = told_ranks(facts)
    assert lines[0].startswith("a rank of 6 (hybrid, 3 share a copy of the base): process ")
    assert lines[1] == (
        "it receives 280.14 GB a step: 280.00 GB of blocks, forward and backward, and 140.0 MB of gradients; "
        "56 s at 5 GB/s beside 4.5 s of computing"
    )
    whole = rank_facts(plan, _of_card(90e9), Ranks(6), None)
    assert whole["traffic"] == {"gathers": 0, "gradients": gradients, "received": gradients}
    assert told_ranks(whole)[1] == "it receives 140.0 MB a step: 140.0 MB of gradients"


def test_processes_of_this_machine_share_its_memory(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "memory", 150_000_000_000)
    monkeypatch.setattr(Machine, "bytes_of", lambda machine, plan: plan.held.n_bytes)
    here = Machine(None, timed=False)
    facts = rank_facts(_laid_out(plan, {"strategy": "auto"}), here, Ranks(2), 1.5)
    assert facts["seconds"] == {"computing": 2 * 4.5}
    assert facts["auto"] == {
        "shard": 1,
        "reason": "a process with a whole base takes 72.08 GB, and 150.00 GB may be taken by 2 processes",
    }
    auto = rank_facts(_laid_out(plan, {"strategy": "auto"}), here, Ranks(3), None)["auto"]
    assert auto["shard"] == 3


def test_a_layout_that_does_not_divide_the_processes_is_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="shard: 4 must divide the 6 processes"):
        rank_facts(_laid_out(plan, {"shard": 4}), _of_card(90e9), Ranks(6), None)


@pytest.mark.parametrize("model", [{}, {"quantization": "nf4"}])
def test_a_base_is_cut_as_it_is_read(recipe: Make, model: dict[str, Any]) -> None:
    plan = plan_recipe(recipe({"method": "lora", "r": 5, "use_dora": True}, model))
    loading, cut = plan.phases["load"], cut_over(plan, 2, 2).phases["load"]
    assert cut.kinds[BASE] == -(-loading.kinds[BASE] // 2)
    assert cut.kinds[EMBEDDINGS] == loading.kinds[EMBEDDINGS]
