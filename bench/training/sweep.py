"""Eight LoRA adapters of different ranks trained in one pass, against eight runs one after another, both veneer's.

Each adapter trains on rows of its own. First every adapter is trained for some steps in both ways, from the same start,
at which it changes the logits. Losses, and the gradients of the first step, are compared; only then the steps (forward,
backward, AdamW for all eight) are timed, in turns.

    python -m bench.training.sweep --data FILE.jsonl [--model smollm2-135m-instruct] [--base dense|nf4]
        [--lengths 64,128,256]

FILE holds one JSON object a line; all its string values are trained on. Ranks are 2 to 64, on all linear layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.lora_step import adapted, base_of, optimizer_of, require_fused, step
from bench.report import add_keep, done, keep, working
from bench.same import gradients, require_same_gradients, share_of, stir
from veneer.adapters.peft_model import PeftModel
from veneer.model.fused.decoder import fuse
from veneer.store.source import resolve
from veneer.train.loss import Scoring
from veneer.train.sweep.shared_base import Part, SharedBase, twin

RANKS = (2, 4, 8, 8, 16, 16, 32, 64)
TOLERANCE = 0.02
Losses = list[float]
Make = Callable[[Any], PeftModel]
"""An adapter on a base."""


@dataclass(frozen=True, slots=True)
class Way:
    """A step of all members, each with a row of its own; ``models`` hold the gradients of the last one."""

    models: list[PeftModel]
    step: Callable[[Tensor], Losses]

    def __call__(self, rows: Tensor) -> Losses:
        return self.step(rows)


def read_tokens(data: Path, tokenizer: Any, n_tokens: int) -> Tensor:
    ids: list[int] = []
    for line in data.read_text(encoding="utf-8").splitlines():
        text = "\n".join(value for value in json.loads(line).values() if isinstance(value, str))
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= n_tokens:
            return torch.tensor(ids[:n_tokens])
    raise SystemExit(f"{data} holds {len(ids)} tokens, {n_tokens} are needed: give a longer file or fewer steps")


def lora(rank: int) -> Make:
    """LoRA on all linear layers, which changes the logits."""
    return lambda base: stir(adapted("veneer", base, r=rank, lora_alpha=2 * rank))


def members(base: Any, makes: Sequence[Make]) -> list[PeftModel]:
    """A model for each adapter, over the same weights, with the same start in every call."""
    found = []
    for number, make in enumerate(makes):
        torch.manual_seed(number)
        found.append(make(twin(base)))
    return found


def alone(base: Any, makes: Sequence[Make]) -> Way:
    """Member after member, each with a forward and a backward pass of its own."""
    models = members(base, makes)
    for model in models:
        require_fused(model)
    optimizers = [optimizer_of(model) for model in models]

    def one_by_one(rows: Tensor) -> Losses:
        turns = zip(models, optimizers, rows, strict=True)
        return [step("veneer", model, optimizer, row[None]) for model, optimizer, row in turns]

    return Way(models, one_by_one)


def together(base: Any, makes: Sequence[Make]) -> Way:
    """All members by one pass over the base."""
    models = members(base, makes)
    shared = SharedBase(twin(base))
    names = [f"member{index}" for index in range(len(models))]
    for name, model in zip(names, models, strict=True):
        shared.add(name, model, name)
    fuse(shared.model)
    optimizers = [optimizer_of(model) for model in models]

    def at_once(rows: Tensor) -> Losses:
        for optimizer in optimizers:
            optimizer.zero_grad()
        batches = ({"input_ids": row[None], "labels": row[None]} for row in rows)
        parts = {n: Part(b, Scoring(), torch.Generator()) for n, b in zip(names, batches, strict=True)}
        losses = [counted.total / counted.n_tokens for counted in shared.losses(parts).values()]
        torch.autograd.backward(losses)
        for optimizer in optimizers:
            optimizer.step()
        return [loss.item() for loss in losses]

    return Way(models, at_once)


def same_gradients(what: str, one: Way, many: Way) -> None:
    """SystemExit where a member's gradients are others in the two ways."""
    for number, pair in enumerate(zip(one.models, many.models, strict=True)):
        require_same_gradients(f"{what}, member {number}", *map(gradients, pair), share_of(pair[0]))


def timed(way: Way, rows: Tensor) -> float:
    began = time.perf_counter()
    way(rows)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--base", choices=["dense", "nf4"], default="dense")
    parser.add_argument("--lengths", default="64,128,256")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    add_keep(parser)
    args = parser.parse_args()
    figures: dict[str, float] = {}
    place, lengths = str(resolve(args.model)), [int(length) for length in args.lengths.split(",")]
    n_rows = args.steps * len(RANKS)
    tokens = read_tokens(args.data, AutoTokenizer.from_pretrained(place), n_rows * max(lengths))
    base = base_of("veneer", args.base, place)
    makes = [lora(rank) for rank in RANKS]
    ways = {"alone": alone(base, makes), "together": together(base, makes)}
    compare(ways, tokens[: n_rows * lengths[0]].view(args.steps, len(RANKS), lengths[0]))
    print(f"{args.base} base, ranks {RANKS}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for length in lengths:
        rows = tokens[: len(RANKS) * length].view(len(RANKS), length)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds):
            for name, way in ways.items():
                working(f"{length} tokens, turn {turn + 1} of {args.rounds}, {name}")
                times[name].append(timed(way, rows))
        single, joint = (statistics.median(times[name]) for name in ("alone", "together"))
        done()
        figures[f"8 x {length}"] = single / joint
        print(
            f"8 x 1 x {length:4} tokens: {single:6.2f} s one after another, {joint:6.2f} s together, "
            f"{single / joint:5.2f}x, {8 * length / joint:6.0f} tokens/s",
            flush=True,
        )
    keep(args.keep, figures)


def compare(ways: dict[str, Way], batches: Tensor) -> None:
    """Train both ways on the same rows. SystemExit where gradients of the first step or losses part."""
    worst = 0.0
    for number, rows in enumerate(batches):
        own, shared = (way(rows) for way in ways.values())
        if number == 0:
            same_gradients("alone and together", *ways.values())
        worst = max(worst, *(abs(a - b) for a, b in zip(own, shared, strict=True)))
        print(
            f"step {number}: losses {own[0]:.4f} … {own[-1]:.4f} (alone) {shared[0]:.4f} … {shared[-1]:.4f} (together)"
        )
    if worst > TOLERANCE:
        raise SystemExit(f"the losses part by {worst:.4f}: no times are given")
    print(f"losses agree within {worst:.4f}", flush=True)


if __name__ == "__main__":
    main()
