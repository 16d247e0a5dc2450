"""``/metrics``: the engine's metrics for Prometheus, collected at each request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from veneer.serve.adapter_metrics import LISTS
from veneer.serve.engine import Engine
from veneer.serve.http.key import CALLER, Key
from veneer.serve.http.lanes import LaneCollector, Lanes
from veneer.serve.metrics import Counter, Gauge, Histogram, MetricSeries
from veneer.serve.schedule.adapter_counts import OTHER

_HELP = {
    "num_requests_running": "Answers in the batch.",
    "num_requests_waiting": "Answers that wait.",
    "kv_cache_usage_perc": "Share of the pages of keys and values that requests hold, 0 to 1.",
    "cache_config_info": "Tokens in a page of keys and values, and the number of pages.",
    "num_preemptions": "Answers that left the batch for lack of memory, and continued later.",
    "admission_rejections": "Requests refused because too much waits or is in flight.",
    "prompt_tokens": "Tokens of prompts whose answers have begun.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens of prompts that were looked for in the prefix cache.",
    "prefix_cache_hits": "Tokens of prompts that were found in the prefix cache.",
    "spec_decode_num_drafts": "Drafts that were tried.",
    "spec_decode_num_draft_tokens": "Tokens of drafts.",
    "spec_decode_num_accepted_tokens": "Tokens of drafts that were right.",
    "request_success": "Answers that ended, by reason.",
    "time_to_first_token_seconds": "Time from the arrival of a request to its first token.",
    "inter_token_latency_seconds": "Time between the tokens of an answer.",
    "e2e_request_latency_seconds": "Time from the arrival of a request to its last token.",
    "request_queue_time_seconds": "Time that a request waited for the batch.",
    "request_prefill_time_seconds": "Time from a request's entry into the batch to its first token.",
    "request_decode_time_seconds": "Time from the first token of an answer to its last.",
    "request_prompt_tokens": "Length of the prompts of ended answers, in tokens.",
    "request_generation_tokens": "Length of ended answers, in tokens.",
    "iteration_tokens_total": "Tokens that a step computed.",
    "lora_adapters_loaded": "Adapters that are loaded.",
    "lora_adapters_running": "Adapters with answers in the batch.",
    "lora_requests_info": "Adapters with answers in the batch and with waiting ones; the value is the present time.",
    "adapter_requests": "Answers of an adapter that ended.",
    "adapter_hits": "Answers of an adapter that was loaded when they were asked for.",
    "adapter_prompt_tokens": "Tokens of an adapter's prompts.",
    "adapter_generation_tokens": "Tokens of an adapter's answers.",
    "adapter_loads": "Loads of an adapter.",
    "adapter_load_seconds": "Time that the loads of an adapter took.",
    "adapter_evictions": "Times that an adapter was evicted.",
    "adapter_loaded": "1 if an adapter is loaded; of other, how many are.",
    "adapter_bytes": "Memory of a loaded adapter.",
}
_VLLM = "vllm:"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Never OpenMetrics: prometheus-client writes its names with underscores for colons, unless it is told not to."""


def add_metrics(app: FastAPI, engine: Engine, model: str, prefix: str, lanes: Lanes) -> None:
    """Add ``/metrics``. Metric names begin with ``prefix`` and a colon; ``model`` is the label ``model_name``.

    The engine must keep statistics.
    """
    engines, process = EngineCollector(engine, model, prefix), ProcessCollector(registry=None)
    threads, turn = LaneCollector(lanes, model, prefix), asyncio.Lock()

    def told() -> bytes:
        return text_of([engines.collect(), threads.collect(), process.collect()], CALLER.get())

    async def metrics() -> Response:
        """Return the metrics in the text format of Prometheus, without adapters that the key may not see."""
        async with turn:  # many threads at once would hold the loop up
            return Response(await asyncio.to_thread(told), headers={"Content-Type": CONTENT_TYPE})

    app.get("/metrics", response_class=PlainTextResponse)(metrics)


class EngineCollector(Collector):
    """Collector of the engine's metrics, read at each call. ``id`` is the label ``engine``."""

    def __init__(self, engine: Engine, model: str, prefix: str, id: str = "0") -> None:
        self._engine, self._prefix = engine, prefix
        self._labels = {"model_name": model, "engine": id}

    def collect(self) -> Iterable[Family]:
        """Return the metrics, grouped by name."""
        families: dict[str, Family] = {}
        for metric in self._engine.metrics():
            name = metric.name.removeprefix(_VLLM)
            labels = self._labels | metric.labels
            if name not in families:
                families[name] = _family(metric, f"{self._prefix}:{name}", _HELP[name], list(labels))
            _add(families[name], metric, [_encodable(value) for value in labels.values()])
        return families.values()


def text_of(metrics: Sequence[Iterable[Family]], key: Key) -> bytes:
    """Return metrics in the text format of Prometheus, grouped by name, without the adapters that a key may not see.

    Adapters beyond the number that have series of their own share one series, which counts hidden adapters too.
    """
    families: dict[str, Family] = {}
    for family in (family for each in metrics for family in each):
        known = families.setdefault(family.name, Family(family.name, family.documentation, family.type))
        known.samples += family.samples if key.sees_all else _visible(family.samples, key)
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


def _visible(samples: Iterable[Sample], key: Key) -> list[Sample]:
    """Return the samples of adapters that the key may see, and the samples of no single adapter.

    Labels that list adapter names keep only the names that the key may see.
    """
    seen = [each for each in samples if each.labels.get("adapter", OTHER) == OTHER or key.sees(each.labels["adapter"])]
    return [each._replace(labels=_named(each.labels, key)) for each in seen]


def _named(labels: Mapping[str, str], key: Key) -> dict[str, str]:
    listed = {name: names for name, names in labels.items() if name in LISTS}
    return {**labels, **{name: ",".join(filter(key.sees, names.split(","))) for name, names in listed.items()}}


class _Collected(Collector):
    """Collector of metrics that the engine counts."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _encodable(name: str) -> str:
    """Return a name that UTF-8 can encode: a folder's name may hold other bytes."""
    return name.encode(errors="replace").decode()


def _family(metric: MetricSeries, name: str, told: str, labels: list[str]) -> Family:
    match metric:
        case Counter():
            return CounterMetricFamily(name, told, labels=labels)
        case Gauge():
            return GaugeMetricFamily(name, told, labels=labels)
    return HistogramMetricFamily(name, told, labels=labels)


def _add(family: Family, metric: MetricSeries, labels: list[str]) -> None:
    match family, metric:
        case HistogramMetricFamily(), Histogram():
            family.add_metric(labels, list(metric.buckets.items()), metric.sum)
        case CounterMetricFamily(), Counter():
            family.add_metric(labels, metric.value)
        case GaugeMetricFamily(), Gauge():
            family.add_metric(labels, metric.value)
