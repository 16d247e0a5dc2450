"""Times and counts of requests, as plain numbers. No torch."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.serve.adapter_metrics import adapter_metrics
from veneer.serve.metrics import Counter, Distribution, Gauge, MetricSeries
from veneer.serve.schedule.adapter_counts import AdapterCount
from veneer.serve.schedule.outputs import RequestStats
from veneer.serve.schedule.request import Request
from veneer.serve.schedule.scheduler import Scheduler
from veneer.serve.schedule.step_plan import Sampled, StepPlan

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FINISH = ("stop", "length", "abort", "error")


@dataclass(slots=True)
class _Times:
    arrival: float  # the wall's clock
    queued: float
    adapter: AdapterCount
    scheduled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    n: int = 0


class Stats:
    """Times of the requests in flight, and counts and distributions since the start, of one engine.

    Each method reads `time.perf_counter` as the time of its event. Only arrivals are times of day.
    """

    def __init__(self) -> None:
        self._times: dict[str, _Times] = {}
        self._n_prompt, self._n_drawn, self._n_sought, self._n_cached = 0, 0, 0, 0
        self._n_drafts, self._n_tried, self._n_right = 0, 0, 0
        self._ended: Counts[str] = Counts()
        self._to_first, self._between = Distribution(_SECONDS), Distribution(_SECONDS)
        self._whole, self._queued, self._read, self._decoded = (Distribution(_LONG) for _ in range(4))
        self._prompts, self._answers, self._steps = Distribution(_TOKENS), Distribution(_TOKENS), Distribution(_ROWS)

    def begin(self, request: Request, adapter: AdapterCount | None = None) -> None:
        """Note that a request has arrived. ``adapter``: the counts of its adapter; None for the base."""
        self._times[request.id] = _Times(time.time(), time.perf_counter(), adapter or AdapterCount())

    def admit(self, requests: Iterable[Request]) -> None:
        """Note that requests entered the batch. Their waiting times and prompts are counted only the first time."""
        now = time.perf_counter()
        for request in requests:
            times = self._times[request.id]
            if not times.scheduled:
                times.scheduled = now
                self._queued.add(now - times.queued)
                self._n_prompt += len(request.prompt)
                times.adapter.n_prompt += len(request.prompt)
                self._n_sought += len(request.prompt) if request.root is not None else 0
                self._n_cached += request.n_cached or 0

    def commit(self, plan: StepPlan, sampled: Sampled) -> None:
        """Note the tokens that a step has drawn."""
        now = time.perf_counter()
        self._steps.add(sum(len(sequence.tokens) for sequence in plan.sequences))
        for sequence in plan.sequences:
            drawn = sampled.drawn.get(sequence.request_id)
            if drawn:
                self._draw(self._times[sequence.request_id], len(drawn), now)
            if drawn and sequence.n_drafted:
                self._n_drafts += 1
                self._n_tried += sequence.n_drafted
                self._n_right += len(drawn) - 1

    def end(self, request: Request) -> None:
        """Count a request that has ended, and drop its times."""
        times = self._times.pop(request.id)
        times.adapter.n_requests += 1
        self._prompts.add(len(request.prompt))
        self._answers.add(times.n)
        self._ended[request.finish_reason or "abort"] += 1
        self._whole.add((times.last or time.perf_counter()) - times.queued)
        if times.first:
            self._read.add(times.first - times.scheduled)
            self._decoded.add(times.last - times.first)

    def of(self, requests: Sequence[Request]) -> RequestStats:
        """Return the times of all answers to one prompt: the earliest time of each event, but the latest time of a last
        token.
        """
        all_times = [self._times[request.id] for request in requests]
        first = min((times.first for times in all_times if times.first), default=0.0)
        queued = min(times.queued for times in all_times)
        return RequestStats(
            num_generation_tokens=sum(times.n for times in all_times),
            arrival_time=min(times.arrival for times in all_times),
            queued_ts=queued,
            scheduled_ts=min((times.scheduled for times in all_times if times.scheduled), default=0.0),
            first_token_ts=first,
            last_token_ts=max(times.last for times in all_times),
            first_token_latency=first - queued if first else 0.0,
            num_preemptions=sum(request.n_preempted for request in requests),
            num_draft_tokens=sum(request.draft.n_tried for request in requests if request.draft is not None),
            num_accepted_tokens=sum(request.draft.n_right for request in requests if request.draft is not None),
        )

    def metrics(self, scheduler: Scheduler, n_refused: int) -> list[MetricSeries]:
        """Return the metrics, in vLLM's names where it has them. Any thread may call it."""
        pages, pool = scheduler.pages, scheduler.pool
        gauges = {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting) + scheduler.sharing.n_parked,
            "kv_cache_usage_perc": pages.n_held / pages.n_pages,
            "lora_adapters_loaded": pool.n_loaded,
            "lora_adapters_running": pool.n_in_batch,
        }
        counters = {
            "num_preemptions": scheduler.n_preemptions,
            "prompt_tokens": self._n_prompt,
            "generation_tokens": self._n_drawn,
            "prefix_cache_queries": self._n_sought,
            "prefix_cache_hits": self._n_cached,
            "admission_rejections": n_refused,
            "spec_decode_num_drafts": self._n_drafts,
            "spec_decode_num_draft_tokens": self._n_tried,
            "spec_decode_num_accepted_tokens": self._n_right,
        }
        distributions = {
            "time_to_first_token_seconds": self._to_first,
            "inter_token_latency_seconds": self._between,
            "e2e_request_latency_seconds": self._whole,
            "request_queue_time_seconds": self._queued,
            "request_prefill_time_seconds": self._read,
            "request_decode_time_seconds": self._decoded,
            "request_prompt_tokens": self._prompts,
            "request_generation_tokens": self._answers,
            "iteration_tokens_total": self._steps,
        }
        memory = {"block_size": str(pages.block), "num_gpu_blocks": str(pages.n_pages)}
        ended = [
            Counter(name="vllm:request_success", labels={"finished_reason": reason}, value=self._ended[reason])
            for reason in _FINISH
        ]
        return [
            *(Gauge(name=f"vllm:{name}", value=float(value)) for name, value in gauges.items()),
            Gauge(name="vllm:cache_config_info", labels=memory, value=1.0),
            *(Counter(name=f"vllm:{name}", value=value) for name, value in counters.items()),
            *ended,
            *(distribution.histogram(f"vllm:{name}") for name, distribution in distributions.items()),
            *adapter_metrics(scheduler),
        ]

    def _draw(self, times: _Times, n: int, now: float) -> None:
        if times.first:
            self._between.add(now - times.last)
        else:
            times.first = now
            self._to_first.add(now - times.queued)
        times.last, times.n = now, times.n + n
        times.adapter.n_drawn += n
        self._n_drawn += n
