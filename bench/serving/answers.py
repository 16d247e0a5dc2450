"""Answers as `veneer eval` makes them: veneer's engine beside transformers' generate on the model adapted by veneer.

SmolLM2-135M-Instruct, chat prompts of some 40 tokens, greedy, in one batch; with an adapter of rank 16 on all linear
layers, and alone. Each side has a model of its own. In float32, which comes first, the answers must be equal before
anything is timed; in 16 bits it is told how many are. Timed in turns, medians.

    python -m bench.serving.answers [--dtype float32] [--prompts 16] [--tokens 32] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.paired import Pair, alternate
from bench.same import require_heard
from veneer import LoraConfig, get_peft_model
from veneer.adapters.chosen import choose
from veneer.answer.answerer import Answerer, Drawing
from veneer.answer.engine import engine_answerer
from veneer.answer.model import ModelAnswerer
from veneer.evaluate.scoring import Answering, ignore_progress
from veneer.store.bars import quiet
from veneer.store.source import load_model

MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    for name, value in (("prompts", 16), ("tokens", 32), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base: list[str] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for name, dora in (("base", None), ("lora", False), ("dora", True)):
            adapter = None if dora is None else saved(Path(folder) / name, dora)
            found = compare(name, adapter, "float32", args)
            base = found if adapter is None else base
            if adapter is not None:
                require_heard(name, found, base)
            if args.dtype != "float32":
                compare(name, adapter, args.dtype, args)


def saved(folder: Path, dora: bool) -> Path:
    """An adapter away from its start."""
    torch.manual_seed(3)
    config = LoraConfig(r=16, lora_alpha=32, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(MODEL, dtype="float32"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


def compare(name: str, adapter: Path | None, dtype: str, args: argparse.Namespace) -> list[str]:
    """Print the times of a load; return the answers, which both sides give in float32."""
    chosen = choose(MODEL, [] if adapter is None else [adapter], dtype=dtype)
    theirs = ModelAnswerer(chosen.load().joined(), Drawing(), args.prompts)
    parts = chosen.load()
    start = time.perf_counter()
    ours = engine_answerer(parts, Drawing(), args.prompts)
    start = time.perf_counter() - start
    assert not isinstance(ours, str), ours
    prompts = [
        parts.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Tell me a fact about the number {7 * i + 3}."}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for i in range(args.prompts)
    ]

    def run(answerer: Answerer) -> list[str]:
        return answerer.answers(prompts, Answering(max_new_tokens=args.tokens), ignore_progress)

    answers = run(theirs)
    n_equal = sum(a == b for a, b in zip(answers, run(ours), strict=True))
    if dtype == "float32" and n_equal < args.prompts:
        raise SystemExit(f"{name}: only {n_equal} of {args.prompts} answers are equal in float32")
    pair = Pair(name, lambda: run(theirs), lambda: run(ours), 0, 0)
    generate, engine = alternate(pair, args.repeats, calls=1)
    print(
        f"{name} {dtype}: generate {generate / 1e3:.2f} s, engine {engine / 1e3:.2f} s, {generate / engine:.1f}x; "
        f"the engine starts in {start:.2f} s; {n_equal} of {args.prompts} answers equal",
        flush=True,
    )
    return answers


if __name__ == "__main__":
    main()
