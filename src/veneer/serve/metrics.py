"""Metrics in vLLM's names, as `LLM.get_metrics` returns them. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSeries:
    """Metric of a ``name``; ``labels`` distinguish series of one name."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter(MetricSeries):
    """Count since the start, or a sum of seconds, which only grows."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge(MetricSeries):
    """Value that may rise and fall, as it is now."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(MetricSeries):
    """Distribution since the start: ``buckets`` are the numbers of values up to a bound, ``+Inf`` the last."""

    count: int
    sum: float
    buckets: dict[str, int]


class Distribution:
    """Counts of values in buckets, each up to a bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.sum = tuple(map(float, bounds)), 0.0
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def histogram(self, name: str) -> Histogram:
        """Return the metric of a name."""
        totals = list(accumulate(self.counts))
        bounds = [*map(str, self.bounds), "+Inf"]
        return Histogram(name=name, count=totals[-1], sum=self.sum, buckets=dict(zip(bounds, totals, strict=True)))
