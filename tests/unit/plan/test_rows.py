"""Seconds are those of a recipe's own rows, if a file holds them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.models import byte_tokenizer
from tests.unit.plan.conftest import Make

from veneer.plan import machine, rows, start
from veneer.plan.plan import plan_recipe
from veneer.plan.report import Machine, shown, told
from veneer.plan.rows import OwnRows, filled, own_rows
from veneer.plan.step import Batch
from veneer.plan.time import ROUGH
from veneer.recipe.recipe import Recipe, parse_recipe

LENGTHS = (4, 9, 30, 12)
"""Of texts in bytes, each of which is a token; one more ends a row, and the longest row is cut to 23."""


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows beside the recipe, and a tokenizer; nothing is measured."""
    monkeypatch.setattr(rows, "load_tokenizer", lambda source: byte_tokenizer())
    monkeypatch.setattr(machine.Rates, "_once", lambda rates, key, measure: 1e-9)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    start._file().parent.mkdir(parents=True)
    start._file().write_text('{"bytes": 300000000}')
    monkeypatch.chdir(tmp_path)
    write(LENGTHS)


def write(lengths: tuple[int, ...]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))


def of(recipe: Recipe) -> OwnRows | None:
    n_rows = recipe.training_config().per_device_train_batch_size
    return own_rows(recipe, Batch(n_rows=n_rows, length=23))


@pytest.mark.parametrize(
    ("data", "full", "n_rows"),
    [
        ({}, {"n_rows": 3}, 3),
        ({}, {"n_rows": 7}, 4),  # of a file of four
        ({"limit": 2}, {"n_rows": 7}, 2),
        ({}, {"n_rows": 7, "packed": True}, 7),
        ({"train": "none.jsonl"}, {"n_rows": 7}, 7),
        ({"more": [{"source": "rows.jsonl"}]}, {"n_rows": 7}, 7),
    ],
)
def test_a_batch_has_no_more_rows_than_its_file(
    data: dict[str, Any], full: dict[str, Any], n_rows: int, recipe: Make
) -> None:
    given = recipe(per_device_train_batch_size=full["n_rows"]).model_dump(exclude_unset=True)
    made = parse_recipe(given | {"data": {"train": "rows.jsonl", **data}})
    assert filled(Batch(length=23, **full), made).n_rows == n_rows


def test_both_answers_of_a_pair_are_rows_of_the_batch(recipe: Make) -> None:
    pairs = parse_recipe(recipe(per_device_train_batch_size=7).model_dump(exclude_unset=True) | {"task": "dpo"})
    assert filled(Batch(n_rows=14, length=23), pairs).n_rows == 8


@pytest.mark.parametrize(
    ("training", "length"),
    [
        ({"per_device_train_batch_size": 1}, 13),  # the mean of 5, 10, 23 and 13, rounded
        ({"per_device_train_batch_size": 5}, 23),
        ({"per_device_train_batch_size": 3, "train_sampling_strategy": "group_by_length"}, 18),  # of 13 and 23
        ({"per_device_train_batch_size": 1, "pad_to_multiple_of": 8}, 16),  # of 8, 16, 24 and 16
    ],
)
def test_a_batch_is_as_long_as_its_longest_row_on_average(training: dict[str, Any], length: int, recipe: Make) -> None:
    found = of(recipe(**training))
    assert found is not None
    assert (found.batch.length, found.n_rows) == (length, 4)


def test_rows_are_counted_as_they_are_read(recipe: Make) -> None:
    Path("rows.jsonl").write_text('{"question": "abcde", "answer": "fg"}\n')
    values = recipe(per_device_train_batch_size=1).model_dump(exclude_unset=True)
    values["data"] |= {"prompt": "Q: {question}", "completion": " {answer}"}
    found = of(parse_recipe(values))
    assert found is not None
    assert found.batch.length == len("Q: abcde fg") + 1


def test_of_a_large_file_some_rows_at_its_front_are_encoded(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_READ", 10)
    monkeypatch.setattr(rows, "MOST_ENCODED", 3)
    write((3, 1, 1, 1, 5, 1, 1, 1, 10, 1, *[20] * 30))  # those that stand for others are every fourth
    found = of(recipe(per_device_train_batch_size=1))
    assert found is not None
    assert (found.batch.length, found.n_rows) == (7, 3)


def test_rows_for_a_gguf_base_are_encoded_too(recipe: Make) -> None:
    values = recipe(per_device_train_batch_size=1).model_dump(exclude_unset=True)
    values["model"]["source"] = "base.gguf"
    found = of(parse_recipe(values))
    assert found is not None
    assert found.n_rows == 4


@pytest.mark.parametrize("change", ["packed", "missing", "no rows", "hub", "preset", "broken"])
def test_rows_that_fill_their_batch_or_cannot_be_read_count_as_full(change: str, recipe: Make, tmp_path: Path) -> None:
    values = recipe().model_dump(exclude_unset=True)
    if change in ("hub", "missing"):
        values["data"]["train"] = "somebody/rows" if change == "hub" else "none.jsonl"
    if change == "preset":
        values["model"]["source"] = "smollm2-135m"
    if change in ("no rows", "broken"):
        Path("rows.jsonl").write_text("" if change == "no rows" else '{"columns": "of no form"}\n')
    assert own_rows(parse_recipe(values), Batch(n_rows=3, length=23, packed=change == "packed")) is None


def test_a_plan_is_timed_by_them_and_says_so(recipe: Make) -> None:
    made = recipe(per_device_train_batch_size=1)
    plan, here = plan_recipe(made), Machine(None, timed=True)
    facts = here.facts(plan, 20)
    assert facts["time"]["rows"] == {"encoded": 4, "length": 13}
    own = here.seconds(plan_recipe(made, batch=Batch(n_rows=1, length=13))).step
    assert facts["time"]["seconds_a_step"] == pytest.approx(own)
    assert own < 0.9 * here.seconds(plan).step
    assert facts["process"]["bytes"] == here.bytes_of(plan)  # memory is that of full rows
    words = "of its own rows (1 row of 13 tokens on average, by 4 that were encoded)"
    assert words in told(plan, facts)
    rough = {**facts, "time": {**facts["time"], "source": ROUGH}}
    assert f"{words.removesuffix(')')}; {ROUGH})" in told(plan, rough)
    page = io.StringIO()
    Console(width=500, file=page).print(shown(plan, facts))
    assert words in page.getvalue()
    Path("rows.jsonl").unlink()
    assert "where its rows are full" in told(plan, here.facts(plan, None))
