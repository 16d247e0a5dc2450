"""The sample that `make test` runs of a product of parameters has every value of each."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from sampling import mark_full, sample, without_repeats

SIZES = {"dtype": 2, "shape": 5, "option": 3}


def test_every_value_of_every_parameter_is_there() -> None:
    cases = [
        dict(zip(SIZES, values, strict=True))
        for values in itertools.product(*map(range, SIZES.values()))
        if values[:2] != (1, 3)  # a product need not be whole
    ]
    kept = [cases[place] for place in sample(cases)]
    assert len(kept) == 5
    for name, n in SIZES.items():
        assert {case[name] for case in kept} == set(range(n))


def test_the_sample_is_the_same_each_time_and_never_empty() -> None:
    cases = [{"a": i, "b": j} for i in range(3) for j in range(3)]
    assert sample(cases) == sample(cases) == {0, 4, 8}
    assert sample([{"backend": 1}]) == sample([{"backend": 1}], 2) == {0}


def test_every_two_values_meet() -> None:
    cases = [dict(zip(SIZES, values, strict=True)) for values in itertools.product(*map(range, SIZES.values()))]
    kept = [cases[place] for place in sample(cases, 2)]
    assert len(kept) == 15  # of 30: two shapes of three would do for no option
    for one, other in itertools.combinations(SIZES, 2):
        assert len({(case[one], case[other]) for case in kept}) == SIZES[one] * SIZES[other]


SHAPES = [(1, 2), (3, 5), (3, 2)]


class Case:
    """A case as pytest collects it, as far as it is read."""

    def __init__(self, backend: str, shape: tuple[int, int], *, product: bool) -> None:
        self.nodeid = f"test_op.py::test_values[{backend}-{shape}]"
        self.callspec = SimpleNamespace(params={"backend": backend, **dict(zip("nd", shape, strict=True))})
        self.product, self.marks = product, list[Any]()

    def get_closest_marker(self, name: str) -> bool:
        return self.product and name == "product"

    def iter_markers(self, name: str) -> list[Any]:
        return [SimpleNamespace(args=("n, d", SHAPES))] if name == "parametrize" else []

    def add_marker(self, mark: str) -> None:
        self.marks.append(mark)


@pytest.mark.parametrize("product", [False, True])
def test_the_interpreter_and_products_are_sampled_and_no_other_test(product: bool) -> None:
    shapes = [SHAPES[place] for place in (0, 1, 1, 2, 0)]
    cases = [Case(backend, shape, product=product) for backend in ("cpu", "triton") for shape in shapes]
    mark_full(cases)
    few = [[], [], ["full"], ["full"], ["full"]]
    assert [case.marks for case in cases] == (few if product else [[]] * 5) + few
    kept, left = without_repeats(cases)
    assert left == [cases[7], cases[9]]
    assert kept == [case for case in cases if case not in left]
