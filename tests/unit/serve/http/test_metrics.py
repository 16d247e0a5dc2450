"""Metrics of a server, as Prometheus's own parser reads them."""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families as parsed

from veneer import LLM, SamplingParams
from veneer.serve.http import metrics
from veneer.serve.http.key import Key
from veneer.serve.http.metrics import EngineCollector, text_of
from veneer.serve.metrics import Counter, Gauge
from veneer.serve.schedule.adapter_counts import OTHER, AdapterCounts

from .test_server import PROMPT, Server


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("told")
    for name in ("lora", "rslora"):
        shutil.copytree(adapters[name].path, folder / name)
    running = Server(base_folder, folder)
    yield running
    running.stop()


def scraped(server: Server, accept: str = "") -> tuple[str, dict[tuple[str, ...], float]]:
    """The content type, and the values by name and labels, but for those that all have."""
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request) as answer:
        return answer.headers["Content-Type"], values_of(parsed(answer.read().decode()))


def values_of(families: Any) -> dict[tuple[str, ...], float]:
    found = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith(("process_", "python_")):
                assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
            found[(sample.name, *labels.values())] = sample.value
    return found


def test_metrics_count_what_was_asked(server):
    before = scraped(server)[1]
    for model, n in (("tiny", 3), ("lora", 4), ("lora", 5)):
        server.client.completions.create(model=model, prompt=PROMPT, max_tokens=n, temperature=0)
    weights = {"lora": 0.7, "rslora": 0.3}
    server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, extra_body={"adapter": weights})
    content_type, after = scraped(server)
    assert content_type.startswith("text/plain; version=0.0.4")
    grown = {
        name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)
    }  # fmt: skip
    assert grown["veneer:prompt_tokens_total",] == 4 * len(PROMPT)
    assert grown["veneer:generation_tokens_total",] == 19
    assert grown["veneer:request_success_total", "length"] == 4
    assert grown["veneer:time_to_first_token_seconds_count",] == 4
    assert grown["veneer:request_generation_tokens_bucket", "5.0"] == 3
    assert grown["veneer:request_generation_tokens_bucket", "+Inf"] == 4
    for name, n_requests, n_drawn in (("lora", 2, 9), (OTHER, 1, 7)):  # a mix has no name of its own
        assert grown["veneer:adapter_requests_total", name] == n_requests
        assert grown["veneer:adapter_prompt_tokens_total", name] == n_requests * len(PROMPT)
        assert grown["veneer:adapter_generation_tokens_total", name] == n_drawn
        assert grown["veneer:adapter_loads_total", name] == 1
        assert grown.get(("veneer:adapter_hits_total", name), 0) == n_requests - 1
        assert grown["veneer:adapter_loaded", name] == 1
        assert grown["veneer:adapter_bytes", name] > 0
    assert after["process_resident_memory_bytes",] > 1e6


def test_names_have_their_colon_also_for_who_prefers_openmetrics(server):
    content_type, found = scraped(server, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert ("veneer:num_requests_running",) in found


def test_vllms_prefix_and_names_that_are_no_text(server):
    registry = CollectorRegistry()
    registry.register(EngineCollector(server.engine, "tiny\udcff", "vllm"))
    names = [sample.name for family in parsed(generate_latest(registry).decode()) for sample in family.samples]
    assert {"vllm:num_requests_waiting", "vllm:lora_requests_info", "vllm:kv_cache_usage_perc"} <= set(names)
    assert not [name for name in names if not name.startswith("vllm:")]


def test_evictions_are_counted_by_name(base_folder, adapters):
    llm = LLM(base_folder, max_loras=1, disable_log_stats=False)
    for name in ("lora", "rslora", "lora"):
        llm.generate(PROMPT, SamplingParams(max_tokens=1), lora_request=adapters[name], use_tqdm=False)
    found = {
        (metric.name.removeprefix("vllm:adapter_"), *metric.labels.values()): metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter | Gauge)
    }
    assert [found["loads", name] for name in ("lora", "rslora", OTHER)] == [2, 1, 0]
    assert [found["evictions", name] for name in ("lora", "rslora", OTHER)] == [1, 1, 0]
    assert [found["loaded", name] for name in ("lora", "rslora", OTHER)] == [1, 0, 0]
    llm.llm_engine.remove_lora(adapters["lora"].adapter_id)
    assert {labels["adapter"] for labels in _labels(llm)} == {"rslora", OTHER}


def _labels(llm: LLM) -> list[dict[str, str]]:
    return [metric.labels for metric in llm.get_metrics() if "adapter" in metric.labels]


def test_the_batchs_adapters_are_told_by_name(base_folder, adapters):
    llm = LLM(base_folder, max_loras=1, disable_log_stats=False)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    llm.enqueue([PROMPT] * 2, params, lora_request=[adapters["lora"], adapters["rslora"]])
    while not llm.engine.scheduler.running:
        if not llm.engine.has_work:
            llm.engine.wait()
        llm.engine.step()
    [info] = [metric for metric in llm.get_metrics() if metric.name == "vllm:lora_requests_info"]
    assert info.labels == {"max_lora": "1", "running_lora_adapters": "lora", "waiting_lora_adapters": "rslora"}
    llm.wait_for_completion(use_tqdm=False)


def test_names_beyond_the_first_are_counted_together():
    counts = AdapterCounts(most=2)
    for n, name in enumerate(("a", "b", "c", OTHER, "a"), start=1):
        counts.of(name).n_loads += n
    assert {name: count.n_loads for name, count in counts.all().items()} == {OTHER: 7, "a": 6, "b": 2}
    counts.forget("a")
    counts.forget(OTHER)
    counts.of("c").n_loads += 11
    assert {name: count.n_loads for name, count in counts.all().items()} == {OTHER: 7, "b": 2, "c": 11}


def test_lists_of_names_are_those_that_a_key_sees():
    gauge = GaugeMetricFamily("g", "d", labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"])
    gauge.add_metric(["3", "alice-1,bob-secret", "bob-secret"], 7.0)
    for pattern, lists in (("*", ("alice-1,bob-secret", "bob-secret")), ("alice-*", ("alice-1", "")), ("x", ("", ""))):
        text = text_of([[gauge], [gauge]], Key(adapters=(pattern,))).decode()
        [family] = parsed(text)
        assert [tuple(sample.labels.values()) for sample in family.samples] == [("3", *lists)] * 2


def test_metrics_are_told_to_one_client_at_a_time(server, monkeypatch):
    inside, most = [], []

    def slow(*given: Any) -> bytes:
        inside.append(given)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return b""

    monkeypatch.setattr(metrics, "text_of", slow)
    with ThreadPoolExecutor(8) as clients:
        assert [told for _, told in clients.map(scraped, [server] * 8)] == [{}] * 8
    assert most == [1] * 8
