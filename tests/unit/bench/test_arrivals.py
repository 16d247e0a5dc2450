"""bench/serving/serve_arrivals.py: what it tells of a run, and a run through."""

from __future__ import annotations

import pytest

from bench.serving import serve_arrivals as arrivals
from launch import module


def test_times_count_from_the_arrival_and_gaps_from_token_to_token():
    run = arrivals.Run(arrivals=[0.0, 3.0], times=[[0.5, 1.0, 2.5], [3.25, 4.0]])
    assert run.firsts == [0.5, 0.25]
    assert run.gaps == [0.5, 1.5, 0.75]
    assert run.times_per_token == [1.0, 0.75]
    assert run.seconds == 4.0


def test_arrivals_have_the_rate():
    times = arrivals.arrivals_of(5.0, 2001)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 5, rel=0.05)
    assert arrivals.arrivals_of(float("inf"), 3) == [0.0, 0.0, 0.0]


def test_every_row_comes_out_once_a_rate():
    options = ("--tiny", "--adapters", "3", "--requests", "9", "--repeats", "1", "--rates", "inf", "31")
    done = module("bench.serving.serve_arrivals", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 of 8 answers are equal" in done.stdout
    for name in ("requests/s", "first token, median, ms", "gap, p99, ms"):
        assert sum(line.startswith(name) for line in done.stdout.splitlines()) == 2, name
