"""A case of looped parameters goes through every combination of them, and a failure names the one that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import looping

SIZES = [(3, 5), (2, 7)]


@pytest.mark.looped("n, d", SIZES)
@pytest.mark.parametrize("kind", ["one"])
def test_other_parameters_and_fixtures_are_given_beside(kind: str, n: int, d: int, tmp_path: Path) -> None:
    assert (n, d) in SIZES
    assert kind == "one"
    assert tmp_path.exists()


class Case:
    """A case as pytest collects it, as far as it is read."""

    _fixtureinfo = SimpleNamespace(argnames=("n", "d", "dtype"))

    def __init__(self, given: object, wrong: object = None) -> None:
        self.wrong = wrong
        self.funcargs = dict.fromkeys(("n", "d", "dtype"), given) | {"request": None}
        self.run = list[dict[str, object]]()

    def iter_markers(self, name: str) -> list[Any]:
        assert name == "looped"
        return [SimpleNamespace(args=(("n", "d"), SIZES)), SimpleNamespace(args=("dtype", ["f", "b"]))]

    def obj(self, **given: object) -> None:
        self.run.append(given)
        assert given != self.wrong


def test_a_case_runs_every_combination_once() -> None:
    case = Case(looping.EACH)
    assert looping.run(case)
    assert case.run == [{"n": n, "d": d, "dtype": dtype} for n, d in SIZES for dtype in "fb"]


def test_a_failure_names_its_combination() -> None:
    case = Case(looping.EACH, wrong={"n": 2, "d": 7, "dtype": "f"})
    with pytest.raises(AssertionError) as failed:
        looping.run(case)
    assert failed.value.__notes__[-1] == "looped: n=2, d=7, dtype='f'"
    assert len(case.run) == 3


def test_a_case_of_one_combination_is_left_to_pytest() -> None:
    case = Case(3)
    assert not looping.run(case)
    assert case.run == []


class Function:
    """Pytest's object of a function; keeps how it was parametrized."""

    def __init__(self, *marks: Any) -> None:
        self.definition = SimpleNamespace(iter_markers=lambda name: marks)
        self.found: Any = None

    def parametrize(self, names: Any, values: Any, **options: Any) -> None:
        self.found = names, values, options


def test_triton_has_a_case_for_each_combination_and_other_back_ends_one() -> None:
    function = Function(*Case(3).iter_markers("looped"))
    looping.parametrize(function, ["reference", "triton", "cpu-avx2"])
    names, values, options = function.found
    assert names == ["backend", "n", "d", "dtype"]
    every = [["triton", n, d, dtype] for n, d in SIZES for dtype in "fb"]
    assert values == [["reference", *[looping.EACH] * 3], *every, ["cpu-avx2", *[looping.EACH] * 3]]
    assert options["ids"] == ["reference", *("-".join(map(str, each)) for each in every), "cpu-avx2"]
    assert options["indirect"] == ["backend"]


def test_a_test_without_looped_parameters_has_its_back_ends_alone() -> None:
    function = Function()
    looping.parametrize(function)
    assert function.found is None
    looping.parametrize(function, ["reference"])
    assert function.found == ("backend", ["reference"], {"indirect": True})
