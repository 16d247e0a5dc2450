"""The work of a step: what is counted where, and the seconds that each kind of it gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from tests.models import llama_config
from tests.unit.plan.conftest import Make

from veneer.plan.machine import Rates
from veneer.plan.plan import plan_recipe
from veneer.plan.work import Product, Work

WORK = Work(
    Counter({Product(3, 5, 7, "bfloat16"): 2}), attention=11.0, torch_attention=13.0, decoded=17.0, moved=19.0,
    updated=23.0, updated_8bit=29.0, n_ops=31, n_watched=37, general=True,
)  # fmt: skip
RATES = {
    "product 3 5 7 bfloat16, cold": 2.0, "attention": 3.0, "attention of torch": 5.0, "decoded": 7.0, "moved": 11.0,
    "elementwise byte of a step": 13.0, "updated in 8 bits": 17.0, "op of a step, fused path": 19.0,
    "op of a step, general path": 23.0, "op watched in a step": 29.0,
}  # fmt: skip


def test_every_kind_of_work_is_added_up() -> None:
    both = WORK.plus(WORK, 3.0)
    for each in fields(Work):
        one, four = getattr(WORK, each.name), getattr(both, each.name)
        if each.name == "products":
            assert {product: n * 4 for product, n in one.items()} == four
        else:
            assert four == (one if each.name == "general" else 4 * one), each.name


@pytest.mark.parametrize(("general", "op"), [(False, 19.0), (True, 23.0)])
def test_every_kind_of_work_has_its_rate_and_an_op_that_of_its_path(general: bool, op: float, tmp_path: Path) -> None:
    rates = Rates(tmp_path / "rates.json", dict(RATES))
    work = WORK.plus(WORK, 0.0)
    work.general = general
    assert rates.parts(work) == {
        "products": 2 * 2.0,
        "attention": 11 * 3.0 + 13 * 5.0,
        "decoding": 17 * 7.0,
        "calls": 31 * op + 37 * 29.0,
        "updates": 23 * 11.0 + 29 * 17.0,
    }
    assert rates.moved() == 13.0
    assert rates.known == RATES


def test_the_optimizer_s_work_is_apart_from_the_rest(recipe: Make) -> None:
    config = llama_config(hidden_size=120, head_dim=40)
    adapter = {"method": "lora", "r": 41, "target_modules": ["q_proj"]}  # each tensor large enough for 8 bits
    plain, coded = (plan_recipe(recipe(adapter, optim=optim), config=config) for optim in ("adamw_torch", "adamw_8bit"))
    assert plain.work.updated_8bit == 0
    assert coded.work.updated_8bit == coded.n_trained
    assert plain.work.updated > 4 * 4 * plain.n_trained
    assert coded.work.updated < plain.work.updated
    assert coded.work.moved == plain.work.moved


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_a_plan_knows_its_path(fused: str, recipe: Make) -> None:
    assert plan_recipe(recipe(fused=fused)).work.general == (fused == "off")
