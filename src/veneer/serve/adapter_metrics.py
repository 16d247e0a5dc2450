"""Metrics of adapters: vLLM's one gauge of names, and a series for each adapter. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from veneer.serve.metrics import Counter, Gauge, MetricSeries
from veneer.serve.schedule.adapter_counts import MOST_NAMES, OTHER, AdapterCount
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.scheduler import Scheduler

_COUNTED: dict[str, Callable[[AdapterCount], float]] = {
    "adapter_requests": lambda count: count.n_requests,
    "adapter_hits": lambda count: count.n_hits,
    "adapter_prompt_tokens": lambda count: count.n_prompt,
    "adapter_generation_tokens": lambda count: count.n_drawn,
    "adapter_loads": lambda count: count.n_loads,
    "adapter_load_seconds": lambda count: count.load_seconds,
    "adapter_evictions": lambda count: count.n_evictions,
}
LISTS = ("running_lora_adapters", "waiting_lora_adapters")
"""Labels of vLLM's gauge that hold names, joined by commas."""


def adapter_metrics(scheduler: Scheduler) -> list[MetricSeries]:
    """Return the metrics of a scheduler's adapters. Any thread may call it.

    If two names refer to equal adapters, the bytes are shown under both names.
    """
    counts, resident = scheduler.pool.counts.all(), scheduler.pool.resident_bytes()
    n_loaded, n_bytes = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for name, size in resident.items():
        place = name if name in counts else OTHER
        n_loaded[place] += 1
        n_bytes[place] += size
    series: list[MetricSeries] = [_of_names(scheduler)]
    for metric, value_of in _COUNTED.items():
        series += [
            Counter(name=f"vllm:{metric}", labels={"adapter": name}, value=value_of(count))
            for name, count in counts.items()
        ]
    for metric, values in (("adapter_loaded", n_loaded), ("adapter_bytes", n_bytes)):
        series += [
            Gauge(name=f"vllm:{metric}", labels={"adapter": name}, value=float(value)) for name, value in values.items()
        ]
    return series


def _of_names(scheduler: Scheduler) -> Gauge:
    """Return the gauge ``vllm:lora_requests_info``, which has adapter names as labels and the current time as its
    value.

    Its label ``max_lora`` is the largest number of requests in a batch if the number of adapters has no limit.
    """
    pool, most = scheduler.pool, scheduler.limits.max_seqs
    labels = {
        "max_lora": str(min(pool.n_acting or most, most)),
        **dict(zip(LISTS, (_joined(pool, pool.acting), _joined(pool, scheduler.waiting.versions)), strict=True)),
    }
    return Gauge(name="vllm:lora_requests_info", labels=labels, value=time.time())


def _joined(pool: AdapterPool, versions: Iterable[str]) -> str:
    names = dict.fromkeys(name for version in versions for name in pool.names_of(version))
    return ",".join(list(names)[:MOST_NAMES])
