"""Admission of requests: limits of waiting ones, clients and priorities, times and counts."""

from __future__ import annotations

import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.serve.http.test_server import PROMPT, Server

from veneer import LLM, SamplingParams
from veneer.errors import ConfigError, QueueFullError
from veneer.serve.metrics import Counter, Distribution, Gauge, Histogram
from veneer.serve.requests.admission import Admission
from veneer.serve.schedule.scheduler import Limits

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def small(base_folder) -> LLM:
    return LLM(base_folder, max_waiting_requests=4, max_waiting_tokens=60, max_num_seqs=2, disable_log_stats=False)


def test_one_request_more_than_may_wait_is_told_when_to_ask_again(small):
    small.enqueue(["ab"] * 3, PARAMS)
    with pytest.raises(
        QueueFullError, match=r"^3 requests with 6 tokens wait, and at most 4 .* ask again in 1 s$"
    ) as told:
        small.enqueue(["ab"] * 2, PARAMS)
    assert told.value.retry_seconds == 1.0
    with pytest.raises(QueueFullError, match="at most 4 with 60 may"):
        small.enqueue(["x" * 55], PARAMS)
    assert len(small.wait_for_completion(use_tqdm=False)) == 3


def test_a_call_may_have_more_prompts_than_may_wait(small, base_folder):
    prompts = [f"prompt {i}" for i in range(11)]
    answers = [output.outputs[0].text for output in small.generate(prompts, PARAMS, use_tqdm=False)]
    right = LLM(base_folder).generate(prompts, PARAMS, use_tqdm=False)
    assert answers == [output.outputs[0].text for output in right]


def test_more_answers_than_can_ever_wait_are_refused(small):
    with pytest.raises(ConfigError, match=r"n=1000000 answers to a prompt of 2 tokens .* raise max_waiting_requests"):
        small.generate("ab", SamplingParams(n=1_000_000, max_tokens=2), use_tqdm=False)
    with pytest.raises(ConfigError, match="at most 4 answers and 60 tokens can wait"):
        small.generate("x" * 61, PARAMS, use_tqdm=False)


class Queue:
    """Queues that hold 9 requests."""

    n_tokens = 90

    def __len__(self) -> int:
        return 9


def test_the_time_to_ask_again_is_that_in_which_as_many_ended(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    for room in ("end_rate", "return_places"):
        monkeypatch.setattr(f"veneer.serve.schedule.{room}.monotonic", lambda: clock.now)
    waiting: Any = Queue()
    backlog = Admission(Limits(max_waiting=9), waiting)
    asked: Any = type("Asked", (), {"params": SamplingParams(n=4, temperature=1), "prompt_ids": (1, 2)})()
    backlog.rate.note(0, True)
    clock.now = 9.3
    with pytest.raises(QueueFullError, match="ask again in 10 s"):  # so long has none ended
        backlog.require_room([asked])
    for clock.now, n, has_work in (
        (10.0, 3, True),
        (14.0, 0, True),
        (21.0, 2, False),
        (1021.0, 0, True),
        (1028.0, 5, True),
    ):
        backlog.rate.note(n, has_work)
    with pytest.raises(QueueFullError, match="ask again in 12 s"):  # 4 are too many, and 10 ended in 28 busy seconds
        backlog.require_room([asked])
    with pytest.raises(QueueFullError, match="ask again in 23 s"):  # behind the 4 of the other
        backlog.require_room([asked])
    clock.now = 1038.0
    assert backlog.rate.seconds(2) == 8  # 10 in 38
    backlog.note_refusal()
    assert backlog.n_refused == 4
    few_tokens = Admission(Limits(max_waiting=99, max_waiting_tokens=95), waiting)
    few_tokens.rate.note(0, True)
    for clock.now, n in ((1100.0, 62), (1110.0, 3)):
        few_tokens.rate.note(n, True)
    asked.prompt_ids = (1,) * 9
    with pytest.raises(QueueFullError, match="ask again in 5 s"):  # 4 x 10 tokens must go; 65 ended in 72 s
        few_tokens.require_room([asked])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"client": ""}, "client='' is no name"),
        ({"client": "x" * 257}, "give a text of 1 to 256 characters"),
        ({"client": 3}, "client=3 is no name"),
        ({"priority": 0.5}, "priority=0.5 must be a whole number"),
        ({"priority": True}, "priority=True"),
        ({"priority": [1, 2]}, "2 priority for 1 prompts"),
    ],
)
def test_clients_and_priorities_that_are_none(small, given, said):
    with pytest.raises(ConfigError, match=said):
        small.generate("ab", PARAMS, use_tqdm=False, **given)


def test_the_urgent_and_those_who_got_little_come_first(small):
    ended = []
    finish = small.engine.step
    ids = small.enqueue(["ab"] * 3, PARAMS, client="many")
    ids += small.enqueue(["ab"], PARAMS, client=["few"])
    while len(ended) < 4:
        ended += [output.request_id for output in finish()]
    assert ended == [ids[0], ids[3], ids[1], ids[2]]
    ids = small.enqueue(["ab"] * 3, PARAMS, priority=[2, 2, -1])
    while len(ended) < 7:
        ended += [output.request_id for output in finish()]
    assert ended[4:] == [ids[2], ids[0], ids[1]]
    small._waiting.clear()


def test_times_and_counts(base_folder, adapters):
    llm = LLM(base_folder, disable_log_stats=False, max_num_batched_tokens=7)
    outputs = llm.generate(["some text", "another"], PARAMS, use_tqdm=False, lora_request=[adapters["lora"], None])
    for output in outputs:
        times = output.metrics
        assert times.queued_ts < times.scheduled_ts < times.first_token_ts < times.last_token_ts
        assert times.first_token_latency == times.first_token_ts - times.queued_ts
        assert (times.num_generation_tokens, times.num_preemptions) == (5, 0)
    metrics = {(metric.name, *metric.labels.values()): metric for metric in llm.get_metrics()}
    counts = {name: metric.value for name, metric in metrics.items() if isinstance(metric, Counter)}
    by_adapter = {name: counts.pop(name) for name in list(counts) if name[0].startswith("vllm:adapter_")}
    load_seconds = by_adapter.pop(("vllm:adapter_load_seconds", "lora"))
    assert load_seconds > 0
    own = {"requests": 1, "hits": 0, "prompt_tokens": 9, "generation_tokens": 5, "loads": 1, "evictions": 0}
    expected = {(f"vllm:adapter_{name}", "lora"): value for name, value in own.items()}
    none = {(f"vllm:adapter_{name}", "other"): 0 for name in (*own, "load_seconds")}
    assert by_adapter == expected | none
    assert counts == {
        ("vllm:prompt_tokens",): 16, ("vllm:generation_tokens",): 10, ("vllm:num_preemptions",): 0,
        ("vllm:prefix_cache_queries",): 16, ("vllm:prefix_cache_hits",): 0,
        ("vllm:spec_decode_num_drafts",): 0, ("vllm:spec_decode_num_draft_tokens",): 0,
        ("vllm:spec_decode_num_accepted_tokens",): 0, ("vllm:admission_rejections",): 0,
        ("vllm:request_success", "length"): 2, ("vllm:request_success", "stop"): 0,
        ("vllm:request_success", "abort"): 0, ("vllm:request_success", "error"): 0,
    }  # fmt: skip
    gauges = {name: metric.value for name, metric in metrics.items() if isinstance(metric, Gauge)}
    pages = llm.engine.scheduler.pages
    assert gauges.pop(("vllm:cache_config_info", "16", str(pages.n_pages))) == 1
    assert gauges.pop(("vllm:adapter_bytes", "lora")) == pages.n_lent > 0
    assert gauges.pop(("vllm:lora_requests_info", "128", "", "")) > 1e9
    assert gauges.pop(("vllm:adapter_loaded", "lora")) == 1
    assert [gauges.pop((f"vllm:adapter_{name}", "other")) for name in ("loaded", "bytes")] == [0, 0]
    assert {name[0]: value for name, value in gauges.items()} == {
        "vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "vllm:kv_cache_usage_perc": 0,
        "vllm:lora_adapters_loaded": 1, "vllm:lora_adapters_running": 0,
    }  # fmt: skip
    steps = metrics.pop(("vllm:iteration_tokens_total",))
    assert steps.sum == 16 + 2 * 4  # the last token of an answer is not read
    numbers = {name[0]: metric.count for name, metric in metrics.items() if isinstance(metric, Histogram)}
    assert numbers == {
        "vllm:time_to_first_token_seconds": 2, "vllm:inter_token_latency_seconds": 8,
        "vllm:e2e_request_latency_seconds": 2, "vllm:request_queue_time_seconds": 2,
        "vllm:request_prefill_time_seconds": 2, "vllm:request_decode_time_seconds": 2,
        "vllm:request_prompt_tokens": 2, "vllm:request_generation_tokens": 2,
    }  # fmt: skip


def test_without_statistics_there_are_none(base_folder):
    llm = LLM(base_folder)
    assert llm.generate("ab", PARAMS, use_tqdm=False)[0].metrics is None
    with pytest.raises(ConfigError, match="start with disable_log_stats=False"):
        llm.get_metrics()


def test_a_distribution_counts_up_to_its_bounds():
    found = Distribution((1.0, 2.5))
    for value in (0.5, 1.0, 1.5, 7.0):
        found.add(value)
    histogram = found.histogram("x")
    assert (histogram.count, histogram.sum) == (4, 10.0)
    assert histogram.buckets == {"1.0": 2, "2.5": 3, "+Inf": 4}


def test_a_full_queue_is_429_with_the_seconds_after_which_to_ask_again(base_folder, tmp_path, monkeypatch):
    server = Server(base_folder, tmp_path)
    try:
        backlog = server.engine.backlog
        monkeypatch.setattr(backlog, "_limits", Limits(max_waiting=2))
        monkeypatch.setattr(backlog.rate, "seconds", lambda n: 7.0)
        body = b'{"prompt": ["a", "b", "c"], "max_tokens": 1, "stream": true}'
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(request)
        assert (told.value.code, told.value.headers["Retry-After"]) == (429, "7")
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200
    finally:
        server.stop()
