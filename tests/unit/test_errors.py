"""Several problems in one message."""

from __future__ import annotations

import pytest

from veneer.errors import listed


@pytest.mark.parametrize(
    ("problems", "source", "most", "told"),
    [
        (["a: 1"], "x.yaml", None, "x.yaml: a: 1"),
        (["a: 1", "a: 1"], "", None, "a: 1"),
        (["a: 1", "b: 2", "a: 1"], "x.yaml", None, "x.yaml: 2 problems\n  a: 1\n  b: 2"),
        (["a: 1", "b: 2 problems\n  c\n  d"], "", None, "2 problems\n  a: 1\n  b: 2 problems\n    c\n    d"),
        (["a", "b", "c", "d", "e"], "x", 3, "x: 5 problems\n  a\n  b\n  c\n  and 2 more"),
        (["a", "b", "c"], "x", 3, "x: 3 problems\n  a\n  b\n  c"),
    ],
)
def test_each_problem_has_a_line_of_its_own(problems: list[str], source: str, most: int | None, told: str) -> None:
    assert listed(problems, source, most) == told


@pytest.mark.parametrize(
    ("problems", "told"),
    [(["a: 1", "a: 1"], "x: a: 1. Mend it"), (["a: 1", "b: 2"], "x: 2 problems\n  a: 1\n  b: 2\nMend it")],
)
def test_a_remedy_stands_behind_one_problem_and_below_several(problems: list[str], told: str) -> None:
    assert listed(problems, "x", remedy="Mend it") == told
