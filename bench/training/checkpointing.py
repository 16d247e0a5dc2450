"""Time and peak memory of a LoRA training step by how its activations are kept.

The step is that of `train.py`: r = 16 on all linear layers, 4 x 512 tokens, bfloat16, AdamW. Each way has a process of
its own; they take steps in turns, one at a time, after two steps that are not counted. Before anything is printed,
their first losses must be equal, and logits, gradients and losses must be PEFT's. Memory is how far a process's
high-water mark (VmHWM) lies above the loaded model; the page cache, which holds an offload file while memory is plenty,
is not in it. Each row is held against a claim often read of gradient checkpointing: 30 to 50% less memory for 30% more
time.

    python -m bench.training.checkpointing [--model smollm2-135m-instruct] [--path fused|general] [--rounds 5]
        [--folder DIR]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.lora_step import adapted, base_of, loss_of, optimizer_of, require_fused
from bench.resident import forget_high_water, high_water_mb
from bench.same import course, require_same, stir
from bench.training.train_sides import same_start
from veneer.model.fused.activation_memory import checkpoint_as_needed
from veneer.model.memory.checkpointing import checkpoint_selectively
from veneer.model.memory.offload import ActivationOffload
from veneer.store.source import resolve

WAYS = ("none", "full", "selective", "as needed", "offload to disk", "selective and disk")


def require_right(place: str, path: str) -> None:
    """PartedError where the path, with nothing recomputed, computes something else than PEFT."""
    peer, ours = (adapted(side, base_of(side, "dense", place)) for side in ("peer", "veneer"))
    if path == "fused":
        require_fused(ours)
    same_start(ours, stir(peer))
    ids = torch.randint(0, ours.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    require_same(f"PEFT and the {path} path", course("peer", peer, ids), course("veneer", ours, ids))


def worker(pipe: Connection, way: str, place: str, path: str, folder: Path) -> None:
    """For every message a step; answered are its loss, its wall and CPU seconds, and the memory above the model."""
    torch.manual_seed(0)
    model = adapted("veneer", base_of("veneer", "dense", place), init_lora_weights=False)
    if path == "fused":
        require_fused(model)
    if way == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif way == "as needed":  # FastLanguageModel's default: on a machine with memory to spare, as "none"
        checkpoint_as_needed(model)
    elif "selective" in way:
        checkpoint_selectively(model)
    context: Any = ActivationOffload(model, "disk", folder) if "disk" in way else nullcontext()
    optimizer = optimizer_of(model)
    ids = torch.randint(0, model.config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(1))
    forget_high_water()
    loaded = high_water_mb()
    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        with context:
            loss = loss_of("veneer", model, ids)
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((loss.item(), *seconds, high_water_mb() - loaded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--path", choices=["fused", "general"], default="fused")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    spawn, place = multiprocessing.get_context("spawn"), str(resolve(args.model))
    require_right(place, args.path)
    pipes: dict[str, Any] = {}
    for way in WAYS:
        pipes[way], other = spawn.Pipe()
        spawn.Process(target=worker, args=(other, way, place, args.path, args.folder), daemon=True).start()
    rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds + 2):
        for way, pipe in pipes.items():
            pipe.send(True)
            rows[way].append(pipe.recv())
            print(way, *(f"{number:.4g}" for number in rows[way][-1]), file=sys.stderr, flush=True)
    firsts = {way: [row[0] for row in found[:2]] for way, found in rows.items()}
    if len({tuple(losses) for losses in firsts.values()}) > 1:
        raise SystemExit(f"the ways do not compute the same: {firsts}")
    report(rows, args.path)


def report(rows: dict[str, list[tuple[float, ...]]], path: str) -> None:
    print(f"{path} path, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; losses equal to the bit")
    print("| activations | wall s | CPU s | MB above the model | time | memory | 30–50% less for at most 30% more |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    medians = {way: [statistics.median(c) for c in zip(*found[2:], strict=True)] for way, found in rows.items()}
    _, base_wall, _, base_memory = medians["none"]
    for way, (_, wall, cpu, memory) in medians.items():
        time_change, memory_change = wall / base_wall - 1, memory / base_memory - 1
        verdict = "" if way == "none" else "yes" if memory_change <= -0.3 and time_change <= 0.3 else "no"
        row = f"{way} | {wall:.2f} | {cpu:.2f} | {memory:.0f} | {time_change:+.0%} | {memory_change:+.0%}"
        print(f"| {row} | {verdict} |")


if __name__ == "__main__":
    main()
