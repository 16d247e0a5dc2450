"""The front of a sweep, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from pictures import check_picture, ticks_of
from veneer.train.sweep.recipe import Sweep
from veneer.train.sweep.report import Outcome, outcomes, pareto_figure, pareto_front, quality, table, write_report


def outcome(name: str, n_trained: int, loss: float | None, best: bool = False, held_out: bool = True) -> Outcome:
    status = "finished" if loss is not None else "diverged"
    return Outcome(name, {"adapter.r": 3}, status, 5, 2.5, loss if held_out else None, n_trained, best, None)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(10, 3.0), (20, 2.0), (20, 2.5), (30, 2.0), (40, None), (50, 1.0), (10, 3.0)]
    assert pareto_front(points) == [True, True, False, False, False, True, True]


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_the_picture_names_every_member_inside_its_frame(n: int) -> None:
    name = "r={} target_modules=all-linear learning_rate=0.0001 " + "and=more " * 20
    found = [outcome(name.format(i), 600_000 * (1 + i // 2), 1.42 - 0.001 * i, best=i % 3 == 0) for i in range(n)]
    figure = pareto_figure([*found, Outcome("gone", {}, "diverged", None, None, None, 5_000, False, None)])
    check_picture(figure)
    axes = figure.axes[0]
    assert ticks_of(axes) == sorted({each.n_trained for each in found})
    assert {text.get_text() for text in axes.texts} == {str(i) for i in range(1, n + 1)}
    below = figure.get_supxlabel().splitlines()
    assert [line.split()[:2] for line in below] == [[str(i + 1), f"r={n - 1 - i}"] for i in range(n)]


def test_what_is_written(tmp_path: Path) -> None:
    found = [outcome("a<b", 10, 3.0, best=True), outcome("large", 1000, 3.5)]
    write_report(Sweep((), tmp_path), found)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["compared_by"] == "held-out loss"
    assert [member["best"] for member in written["members"]] == [True, False]
    assert written["members"][1]["n_trained"] == 1000
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "pareto.html").read_text()
    assert "<svg" in page
    assert "<!-- 1k -->" in page
    assert "a&lt;b" in page
    assert "adapter.r=3" in page
    assert "src=" not in page
    assert "<link" not in page


@pytest.mark.parametrize(("held_out", "said"), [(True, "held-out loss"), (False, "training loss")])
def test_the_table_is_sorted_by_what_members_are_compared_by(held_out: bool, said: str) -> None:
    found = [outcome("worse", 10, 3.0, held_out=held_out), outcome("better", 20, 2.25, best=True)]
    assert quality(found).startswith(said)
    console = Console(width=120, record=True)
    console.print(table([*found, Outcome("gone", {}, "diverged", None, None, None, 5, False, None)]))
    lines = [line.split() for line in console.export_text().splitlines()]
    names = [line[0] for line in lines[1:]]
    assert names == ["better", "worse", "gone"] if held_out else ["better", "worse", "gone"]
    assert lines[1][-1] == "*"
    assert lines[3][-1] == "diverged"


@pytest.mark.parametrize("status", ["diverged", "interrupted"])
def test_a_member_that_did_not_end_has_no_reward(status: str) -> None:
    members = [SimpleNamespace(name=name, changes={}) for name in ("ended", "other")]
    log = [{"reward": 0.9}]
    records = [
        {"status": "finished", "n_trained": 7, "log": [{"reward": 0.1}], "results": {"steps": 3}},
        {"status": status, "n_trained": 7, "log": log},
    ]
    ended, other = outcomes(cast(Any, SimpleNamespace(members=members)), records)
    assert (ended.measure, ended.best) == (-0.1, True)
    assert (other.measure, other.best) == (None, False)
