"""Uncertainty of figures over rows: intervals of a share, and paired differences of two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.errors import ShapeError

Interval = tuple[float, float]

Z_95 = 1.959963984540054  # of the normal distribution: 95% lie within
_DRAWS, _SEED = 2000, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Second model's figure minus the first's on the same rows, its 95% interval, and its p-value.

    The null hypothesis is no difference. ``test`` names the method. ``only_first`` and ``only_second``: the rows that
    only one of them has right, if rows are right or wrong.
    """

    value: float
    interval: Interval
    p_value: float
    test: str
    only_first: int | None = None
    only_second: int | None = None


def wilson_interval(n_right: int, n: int) -> Interval:
    """Return the 95% interval of a share by the score test (Wilson 1927), valid for 0 of n and n of n too.

    Raises ShapeError for no rows.
    """
    if n < 1:
        raise ShapeError("a confidence interval needs at least one row: give one")
    share, square = n_right / n, Z_95**2
    center = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    low, high = center - half, center + half
    return (0.0 if n_right == 0 else max(low, 0.0), 1.0 if n_right == n else min(high, 1.0))


def paired_shares(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Return the difference of two accuracies over the same rows.

    The p-value is McNemar's exact one: the binomial test on the rows that only one model has right. The interval is
    Newcombe's from two Wilson intervals, with the rows' correlation (Newcombe 1998, Statistics in Medicine 17, method
    10). Raises ShapeError if the numbers of rows differ or are zero.
    """
    _require_pairs(len(first), len(second))
    pairs = list(zip(first, second, strict=True))
    both, neither = sum(a and b for a, b in pairs), sum(not a and not b for a, b in pairs)
    one, two = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return Difference(
        value=(two - one) / len(pairs),
        interval=_newcombe(both, one, two, neither),
        p_value=_mcnemar(one, two),
        test="exact McNemar, Newcombe's interval",
        only_first=one,
        only_second=two,
    )


def paired_means(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Difference:
    """Return the difference of two weighted means over the same rows.

    ``first`` and ``second`` hold each row's sum, ``weights`` the number of values in it. A mean is the total of the
    sums over the total of the weights.

    Paired bootstrap over rows (Efron 1979; Koehn 2004): the interval holds the middle 95% of the differences over 2,000
    resamples. The p-value is twice the smaller share on one side of 0. The resamples are always the same. Raises
    ShapeError if the numbers of rows differ or are zero.
    """
    _require_pairs(len(first), len(second))
    change, mass = np.subtract(second, first), np.asarray(weights, dtype=float)
    rows = np.random.default_rng(_SEED).integers(len(change), size=(_DRAWS, len(change)))
    drawn = change[rows].sum(axis=1) / mass[rows].sum(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    smaller = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return Difference(
        value=float(change.sum() / mass.sum()),
        interval=(float(low), float(high)),
        p_value=float(min(1.0, 2 * max(smaller, 1 / _DRAWS))),
        test=f"paired bootstrap over rows, {_DRAWS:,} draws",
    )


def _require_pairs(n_first: int, n_second: int) -> None:
    if n_first != n_second or not n_first:
        raise ShapeError(
            f"results of {n_first} and {n_second} rows cannot be paired: measure both on the same rows, at least one"
        )


def _mcnemar(one: int, two: int) -> float:
    n = one + two
    tail = sum(math.comb(n, k) for k in range(min(one, two) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def _newcombe(both: int, one: int, two: int, neither: int) -> Interval:
    n = both + one + two + neither
    p, q = (both + one) / n, (both + two) / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(both + one, n), wilson_interval(both + two, n)
    marginals = (both + one) * (two + neither) * (both + two) * (one + neither)
    product = both * neither - one * two
    tie = max(product - n / 2, 0.0) if product > 0 else float(product)
    phi = tie / math.sqrt(marginals) if marginals else 0.0
    below = _joined(q - q_low, p_high - p, phi)
    above = _joined(q_high - q, p - p_low, phi)
    return (q - p - below, q - p + above)


def _joined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))
