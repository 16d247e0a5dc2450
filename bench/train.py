"""A LoRA training step (r = 16 on all linear layers, 4 x 512 tokens, bfloat16) against PEFT, in turns in one process.

Both sides start from the same factors. First both are trained on the same rows for some steps and their losses are
compared; only then the step (forward, backward, AdamW) is timed. Seconds are of the wall and of the process's CPU,
which other work on the machine disturbs less.

    python bench/train.py --data FILE.jsonl [--model smollm2-135m-instruct] [--base dense|nf4] [--rounds 5] [--steps 10]

FILE holds one JSON object a line; all its string values are trained on. peft, and for nf4 bitsandbytes, must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.model.fused.decoder import fuse
from veneer.store.source import resolve
from veneer.train.loss import token_loss

ROWS, LENGTH, TOLERANCE = 4, 512, 0.02
Step = Callable[[Tensor], float]


def read_rows(data: Path, tokenizer: Any, n_steps: int) -> list[Tensor]:
    """Batches (4, 512) of the file's text, end to end."""
    wanted, ids = n_steps * ROWS * LENGTH, []
    for line in data.read_text(encoding="utf-8").splitlines():
        text = "\n".join(value for value in json.loads(line).values() if isinstance(value, str))
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise SystemExit(f"{data} holds {len(ids)} tokens, {wanted} are needed: give a longer file or fewer --steps")
    return list(torch.tensor(ids[:wanted]).view(n_steps, ROWS, LENGTH))


def base_of(place: str, base: str, library: Any) -> Any:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if base == "nf4":
        options["quantization_config"] = library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(place, attn_implementation="sdpa", **options)


def lora(library: Any) -> Any:
    return library.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def peer_side(place: str, base: str) -> tuple[Any, Step]:
    import peft

    model = peft.get_peft_model(base_of(place, base, transformers), lora(peft)).train()
    return model, _step(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)


def our_side(place: str, base: str) -> tuple[Any, Step]:
    model: Any = veneer.get_peft_model(base_of(place, base, veneer), lora(veneer)).train()
    if not fuse(model):
        raise SystemExit("the model runs the general path, see the log: there is nothing to compare")

    def loss(ids: Tensor) -> Tensor:
        counted = token_loss(model, {"input_ids": ids, "labels": ids})
        return counted.total / counted.n_tokens

    return model, _step(model, loss)


def _step(model: Any, loss_of: Callable[[Tensor], Tensor]) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(ids: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def same_start(ours: Any, peer: Any) -> None:
    """Copy the peer's factors."""
    from peft import get_peft_model_state_dict

    veneer.set_peft_model_state_dict(ours, get_peft_model_state_dict(peer))


def timed(step: Step, ids: Tensor) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step(ids)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_of(side: Callable[[str, str], tuple[Any, Step]], place: str, base: str, ids: Tensor) -> float:
    """Megabytes by which two steps raise the high-water mark of a process of their own, over the loaded model."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the pool of the parent's threads did not come along
        _, step = side(place, base)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(ids), step(ids)
        os.write(write, str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    return float(os.read(read, 64).decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--base", choices=["dense", "nf4"], default="dense")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    place = str(resolve(args.model))
    batches = read_rows(args.data, AutoTokenizer.from_pretrained(place), args.steps)
    peaks = {name: peak_of(side, place, args.base, batches[0]) for name, side in SIDES.items()}
    (peer, peer_step), (ours, our_step) = (side(place, args.base) for side in SIDES.values())
    same_start(ours, peer)
    worst = 0.0
    for number, ids in enumerate(batches):
        theirs, own = peer_step(ids), our_step(ids)
        worst = max(worst, abs(theirs - own))
        print(f"step {number}: loss {theirs:.4f} (peer) {own:.4f} (veneer)", flush=True)
    if worst > TOLERANCE:
        raise SystemExit(f"the losses part by {worst:.4f}: no times are given")
    times: dict[str, list[tuple[float, float]]] = {"peer": [], "veneer": []}
    for round_number in range(args.rounds):
        ids = batches[round_number % len(batches)]
        times["peer"].append(timed(peer_step, ids))
        times["veneer"].append(timed(our_step, ids))
    report(times, peaks, worst)


def report(times: dict[str, list[tuple[float, float]]], peaks: dict[str, float], worst: float) -> None:
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    print(f"losses agree within {worst:.4f}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, (wall, cpu) in medians.items():
        print(f"{name:8} {wall:7.2f} s wall {cpu:7.2f} s CPU {peaks[name]:7.0f} MB above the loaded model")
    wall, cpu = (theirs / own for theirs, own in zip(medians["peer"], medians["veneer"], strict=True))
    print(f"ratio    {wall:7.2f}x wall {cpu:7.2f}x CPU {peaks['veneer'] / peaks['peer']:7.2f}x memory")


SIDES: dict[str, Callable[[str, str], tuple[Any, Step]]] = {"peer": peer_side, "veneer": our_side}

if __name__ == "__main__":
    main()
