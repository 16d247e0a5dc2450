"""A process holds what it starts with, its tensors, and what the allocator loses between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.plan.conftest import Make

from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import BASE, GRADIENTS, STATE
from veneer.plan.plan import plan_recipe
from veneer.plan.process import ALLOCATOR_BYTES, ROWS_SHARE, WORD_BYTES, process_of
from veneer.recipe.parts import DataPart


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.plan.process.start_bytes", lambda: 7_000_003)


@pytest.mark.parametrize(
    ("way", "n_batches", "between"),
    [(False, 1, 0.2 * 3_000_017), ("selective", 1, 0.2 * 3_000_017), (True, 1, 0.0), (False, 3, 0.1 * 3_000_017)],
)
def test_memory_is_lost_between_gradients_and_state_where_activations_lie_among_them(
    way: bool | str, n_batches: int, between: float, recipe: Make, tmp_path: Path
) -> None:
    held, kinds = Peak({BASE: 400_009}), {GRADIENTS: 1_000_003, STATE: 2_000_014}
    phases = {"backward": Peak({BASE: 400_009, **kinds})}
    made = recipe(gradient_checkpointing=way, gradient_accumulation_steps=n_batches)
    plan = replace(plan_recipe(made), held=held, phases=phases)
    found = process_of(plan)
    assert (found.start, found.tensors) == (7_000_003, 3_400_026)
    assert found.allocator == ALLOCATOR_BYTES + round(0.02 * 3_000_017 + between)
    assert found.n_bytes == found.start + found.tensors + found.allocator + found.tokenizer


def test_the_tokenizer_counts_by_its_words_and_rows_by_their_files(recipe: Make, tmp_path: Path) -> None:
    plan = plan_recipe(recipe())
    without = process_of(plan)
    assert (without.tokenizer, without.rows) == (WORD_BYTES * plan.config.vocab_size, 0)
    sizes = {"train": 1_000_003, "eval": 50_021, "more": 7_013}
    for name, size in sizes.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in sizes}
    data = {**files, "more": [{"source": files["more"]}]}

    def rows(**changes: object) -> int:
        part = DataPart.model_validate(data | changes)
        return process_of(replace(plan, recipe=plan.recipe.model_copy(update={"data": part}))).rows

    assert rows() == round(ROWS_SHARE * sum(sizes.values()))
    assert rows(eval=None, more=[]) == round(ROWS_SHARE * sizes["train"])
    assert rows(eval="org/set") == round(ROWS_SHARE * (sizes["train"] + sizes["more"]))
    assert rows(streaming=True) == rows(limit=10) == round(ROWS_SHARE * sizes["eval"])
    assert rows(eval_limit=3) == round(ROWS_SHARE * (sizes["train"] + sizes["more"]))
    weighed = [{"source": files["more"], "weight": 3.0}, {"source": files["more"], "count": 5}]
    assert rows(more=weighed, eval=None) == round(ROWS_SHARE * (sizes["train"] + 3 * sizes["more"]))


def test_the_phase_that_is_largest_is_the_one_with_what_is_lost(recipe: Make) -> None:
    trained = {GRADIENTS: 1_000_003, STATE: 2_000_014}
    phases = {"backward": Peak({BASE: 400_009, **trained}), "evaluation": Peak({BASE: 3_400_027})}
    plan = replace(plan_recipe(recipe()), held=Peak({BASE: 400_009}), phases=phases)
    assert plan.peak_phase == "evaluation"
    found = process_of(plan)
    assert found.tensors == phases["backward"].n_bytes
    assert found.allocator == ALLOCATOR_BYTES + round(0.02 * 3_000_017 + 0.2 * 3_000_017)
