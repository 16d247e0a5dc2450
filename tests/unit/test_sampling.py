"""The sample that `make test` runs of a product of parameters has every value of each."""

from __future__ import annotations

import itertools

from sampling import sample


def test_every_value_of_every_parameter_is_there() -> None:
    sizes = {"dtype": 2, "shape": 5, "option": 3}
    cases = [
        dict(zip(sizes, values, strict=True))
        for values in itertools.product(*map(range, sizes.values()))
        if values[:2] != (1, 3)  # a product need not be whole
    ]
    kept = [cases[place] for place in sample(cases)]
    assert len(kept) == 5
    for name, n in sizes.items():
        assert {case[name] for case in kept} == set(range(n))


def test_the_sample_is_the_same_each_time_and_never_empty() -> None:
    cases = [{"a": i, "b": j} for i in range(3) for j in range(3)]
    assert sample(cases) == sample(cases) == {0, 4, 8}
    assert sample([{}]) == set()
    assert sample([{"backend": 1}]) == {0}
