"""Intervals and paired differences against closed forms, published numbers and torch-free arithmetic."""

from __future__ import annotations

import math

import pytest

from veneer.errors import DataError, ShapeError
from veneer.evaluate.confusion import Confusion
from veneer.evaluate.statistics import Z_95, paired_means, paired_shares, wilson_interval


def test_wilson_is_right_at_the_ends() -> None:
    square = Z_95**2
    assert wilson_interval(0, 16) == pytest.approx((0, square / (16 + square)))
    assert wilson_interval(16, 16) == pytest.approx((16 / (16 + square), 1))
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)  # the same table
    with pytest.raises(ShapeError, match="one row"):
        wilson_interval(0, 0)


def rows(both: int, one: int, two: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + one) + [False] * (two + neither)
    return first, [True] * both + [False] * one + [True] * two + [False] * neither


def test_mcnemar_is_the_binomial_test_on_the_rows_that_differ() -> None:
    found = paired_shares(*rows(7, 2, 9, 5))
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert found.p_value == pytest.approx(2 * tail)
    assert (found.only_first, found.only_second, found.value) == (2, 9, pytest.approx(7 / 23))
    assert paired_shares(*rows(3, 4, 4, 1)).p_value == 1
    assert paired_shares(*rows(3, 0, 0, 1)).p_value == 1


@pytest.mark.parametrize(
    ("counts", "interval"),  # Newcombe 1998 (paired), table III, method 10; his difference is ours the other way round
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((30, 0, 0, 0), (-0.1135, 0.1135)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
        # Tables in which both models are mostly right or wrong together, by the formulas of method 10 written out apart
        # from this code: phi's correction takes all of the correlation in the first, and half of n in the others.
        ((1, 1, 7, 12), (-0.5069, -0.0256)),  # 12 - 7 < 21 / 2
        ((14, 5, 0, 22), (0.0115, 0.2265)),
        ((53, 5, 8, 34), (-0.1017, 0.0424)),
    ],
)
def test_the_interval_of_a_paired_difference(counts: tuple[int, ...], interval: tuple[float, float]) -> None:
    low, high = paired_shares(*rows(*counts)).interval
    assert (-high, -low) == pytest.approx(interval, abs=1e-4)


def test_the_bootstrap_of_means_weighs_rows_and_covers_the_difference() -> None:
    first, weights = [3.0 * n for n in range(1, 41)], [float(n) for n in range(1, 41)]
    second = [x + 0.5 * w + (0.3 if n % 2 else -0.3) for n, (x, w) in enumerate(zip(first, weights, strict=True))]
    found = paired_means(first, second, weights)
    assert found.value == pytest.approx(0.5, abs=1e-9)
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found == paired_means(first, second, weights)
    assert found.p_value == pytest.approx(2 / 2000)
    same = paired_means(first, first, weights)
    assert (same.value, same.interval, same.p_value) == (0, (0, 0), 1)
    with pytest.raises(ShapeError, match="the same rows"):
        paired_means(first, second[1:], weights)


def test_a_confusion_table() -> None:
    found = Confusion.of(["a", "b", "c"], list("aabbbc"), list("abbbaa"))
    assert found.counts == ((1, 1, 0), (1, 2, 0), (1, 0, 0))
    assert [found.n_rows(i) for i in range(3)] == [2, 3, 1]
    assert [found.n_predicted(i) for i in range(3)] == [3, 3, 0]
    assert [found.n_right(i) for i in range(3)] == [1, 2, 0]
    with pytest.raises(DataError, match="are not among the labels"):
        Confusion.of(["a", "b"], ["a"], ["z"])
