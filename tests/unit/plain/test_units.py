"""Amounts as a person reads them."""

from __future__ import annotations

import pytest

from veneer.plain.units import count, duration, size


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0.0 kB"),
        (1_234, "1.2 kB"),
        (49_900, "49.9 kB"),
        (50_000, "0.1 MB"),
        (269_060_000, "269.1 MB"),
        (999_940_000, "999.9 MB"),
        (1_000_000_000, "1.00 GB"),
        (14_483_000_000, "14.48 GB"),
        (1_412_000_000_000, "1,412.00 GB"),
    ],
)
def test_sizes(n_bytes: int, shown: str) -> None:
    assert size(n_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (268, "4 min 28 s"),
        (3599.7, "1 h 0 min"),
        (7530, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_one_of_a_thing_is_not_several() -> None:
    assert [count(n, "thread") for n in (0, 1, 2, 1_024)] == ["0 threads", "1 thread", "2 threads", "1,024 threads"]
