"""More adapters than there is room for: 64 adapters at random, 16 of them loaded at a time, beside 16 that stay.

Requests are greedy, a number of them at once, the next when one ends. Before anything is timed, answers are compared
with those of each adapter alone, on both engines, and must be the likeliest ones (`likeliest.py`). Then three loads
take turns, each as often as asked: requests for 16 adapters that are loaded; for 64 with room for 16; and for the same
16 while every step or so one more adapter is read that none of them names. Told are tokens a second and, of requests
that decode, the gaps between their tokens: medians.

    python -m bench.serving.serve_cold MODEL [--tiny] [--requests 96] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.report import add_keep, done, keep, working
from bench.same import require_heard
from bench.serving.likeliest import Answered, require_likeliest
from bench.tiny_model import write_tiny
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model
from veneer.serve.engine import Engine
from veneer.serve.schedule.outputs import RequestOutput
from veneer.serve.schedule.sampling_params import RequestOutputKind
from veneer.store.source import load_model, resolve

ROOM, RANK, PROMPT, TOKENS, AT_ONCE = 16, 16, 32, 64, 32
THROUGHPUT, GAP = 0.7, 2.0  # the goals: of 16 resident, and of the p99 of gaps without loads


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens a second, and the seconds between two tokens of a request behind its first."""

    rate: float
    gaps: list[float]
    n_loads: int

    def gap(self, percent: int) -> float:
        return statistics.quantiles(self.gaps, n=100)[percent - 1]


@dataclass(frozen=True, slots=True)
class Runs:
    """Repeated runs of one load."""

    runs: list[Run]

    @property
    def rate(self) -> float:
        return statistics.median(run.rate for run in self.runs)

    @property
    def n_loads(self) -> float:
        return statistics.median(run.n_loads for run in self.runs)

    def gap(self, percent: int) -> float:
        return statistics.median(run.gap(percent) for run in self.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: its times mean nothing")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_keep(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny(Path(scratch) / "base") if args.tiny else str(resolve(args.model))
        adapters = write_adapters(model, Path(scratch), args.adapters)
        keep(args.keep, compare(model, adapters, args.requests, args.repeats))


def write_adapters(model: str, folder: Path, n: int) -> list[LoRARequest]:
    """Adapters of rank 16 on all linear layers, away from their start."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted, made = get_peft_model(load_model(model, dtype=torch.bfloat16), config), []
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    for number in range(n):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.02)
        adapted.save_pretrained(folder / str(number))
        made.append(LoRARequest(f"a{number}", number + 1, str(folder / str(number))))
    return made


def compare(model: str, adapters: Sequence[LoRARequest], n_requests: int, repeats: int) -> dict[str, float]:
    """Print the three loads, medians of ``repeats`` turns, and return the two ratios that have goals."""
    options = {"dtype": "bfloat16", "max_model_len": PROMPT + TOKENS, "max_num_seqs": AT_ONCE}
    options["enable_prefix_caching"] = False
    engines = [LLM(model, max_cpu_loras=n, max_loras=n, **options) for n in (ROOM, ROOM + 2)]
    draw = random.Random(0)
    few, many = ([draw.choice(each) for _ in range(n_requests)] for each in (adapters[:ROOM], adapters))
    require_equal(engines[0], model, many[:8])
    for adapter in adapters[:ROOM]:
        for llm in engines:
            llm.llm_engine.add_lora(adapter)
    for adapter in adapters[:ROOM]:
        engines[1].llm_engine.pin_lora(adapter.adapter_id)
    require_equal(engines[1], model, few[:8])
    turns = []
    for turn in range(repeats):
        working(f"turn {turn + 1} of {repeats}")
        turns.append((run(engines[1], few), run(engines[1], few, adapters[ROOM:]), run(engines[0], many)))
    done()
    resident, beside, cold = (Runs(list(runs)) for runs in zip(*turns, strict=True))
    print(f"\n{'':28} {'tok/s':>8} {'loads':>6} {'gap p50 ms':>11} {'p99 ms':>8}")
    for name, each in {
        f"{ROOM} resident": resident,
        f"{ROOM} resident, others loaded": beside,
        f"{len(adapters)} at random, room for {ROOM}": cold,
    }.items():
        gaps = (1e3 * each.gap(50), 1e3 * each.gap(99))
        print(f"{name:28} {each.rate:8.1f} {each.n_loads:6.0f} {gaps[0]:11.1f} {gaps[1]:8.1f}")
    rate, gap = cold.rate / resident.rate, beside.gap(99) / resident.gap(99)
    print(f"\nthroughput: {rate:.2f} of {ROOM} resident (goal {THROUGHPUT})")
    print(f"p99 of gaps while others load: {gap:.2f} times that without (goal at most {GAP})")
    return {"throughput": rate, "gap": gap}


def require_equal(llm: LLM, model: str, adapters: Sequence[LoRARequest]) -> None:
    """Stop unless answers in one batch are those of each adapter alone and of the model, and not those of the base."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [prompt_of(i) for i in range(len(adapters))]
    together, plain = (
        [each.outputs[0].token_ids for each in llm.generate(prompts, params, lora_request=asked, use_tqdm=False)]
        for asked in (list(adapters), None)
    )
    require_heard("adapters", together, plain)
    require_likeliest("adapters", model, map(Answered, prompts, together, (adapter.lora_path for adapter in adapters)))
    for prompt, adapter, tokens in zip(prompts, adapters, together, strict=True):
        [alone] = llm.generate([prompt], params, lora_request=adapter, use_tqdm=False)
        if alone.outputs[0].token_ids != tokens:
            raise SystemExit(f"{adapter.name} answers otherwise in a batch")


def prompt_of(number: int) -> list[int]:
    return [(number * 31 + i * 7) % 200 + 1 for i in range(PROMPT)]


@dataclass(slots=True)
class Times:
    """Number of tokens, and the seconds between neighbouring tokens of a request."""

    n: int = 0
    gaps: list[float] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)

    def add(self, output: RequestOutput, now: float) -> None:
        id, n = output.request_id, len(output.outputs[0].token_ids)
        if n and id in self._last:
            self.gaps.append(now - self._last[id])
        self._last[id] = now
        self.n += n


def run(llm: LLM, asked: Sequence[LoRARequest], loaded_beside: Sequence[LoRARequest] = ()) -> Run:
    """Run all requests, AT_ONCE at a time; beside them, requests of one token for adapters that are not loaded."""
    engine, left, others = llm.engine, list(enumerate(asked)), list(loaded_beside)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    flying, strangers, times = set[str](), set[str](), Times()
    with counted_loads(engine.runner) as loads:
        start = time.perf_counter()
        while left or flying:
            while left and len(flying) < AT_ONCE - 1:
                number, adapter = left.pop(0)
                flying.add(submit(engine, prompt_of(number), params, adapter))
            if others and not strangers:
                strangers.add(submit(engine, prompt_of(0)[:1], one, others.pop(0)))
            for output, now in next_outputs(engine):
                if output.request_id in strangers:
                    strangers.discard(output.request_id)
                    continue
                times.add(output, now)
                if output.finished:
                    flying.discard(output.request_id)
        rate = times.n / (time.perf_counter() - start)
    return Run(rate, times.gaps, len(loads))


def submit(engine: Engine, prompt: list[int], params: SamplingParams, adapter: LoRARequest) -> str:
    request = engine.asked(None, prompt, params, adapter)
    engine.submit(request)
    return request.id


def next_outputs(engine: Engine) -> list[tuple[RequestOutput, float]]:
    """Run a step. Return its outputs, each with the time."""
    if not engine.has_work:
        engine.wait()
    outputs = engine.step()
    now = time.perf_counter()
    return [(output, now) for output in outputs]


@contextmanager
def counted_loads(runner: Any) -> Iterator[list[str]]:
    """Yield a list to which each load of an adapter in the context adds its version."""
    loads, load = list[str](), runner.load

    def counted(version: str, adapter: object) -> None:
        loads.append(version)
        load(version, adapter)

    runner.load = counted
    try:
        yield loads
    finally:
        runner.load = load


if __name__ == "__main__":
    main()
