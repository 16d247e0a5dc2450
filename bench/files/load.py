"""Loading a model in 4 bits: veneer against transformers with bitsandbytes, time and peak memory.

    python -m bench.files.load MODEL_FOLDER [--rounds 5]

Both sides load the same folder with the same fields (NF4, double quantization), each time in a process of its own, in
turns; medians are printed. Before anything is timed, the weights of both are compared. Memory is the growth of the
process's high-water mark of resident memory over what it was after the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.report import add_keep, done, ends_as_interrupted, keep, working
from bench.resident import high_water_mb

SIDES = ("bitsandbytes", "veneer")
FIELDS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TARGET_TIME, TARGET_MEMORY = 2.0, 0.5


def load(side: str, folder: Path) -> Any:
    """The model, loaded by one side."""
    import torch
    from transformers import AutoModelForCausalLM

    if side == "veneer":
        from veneer import BitsAndBytesConfig
    else:
        from transformers import BitsAndBytesConfig
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**FIELDS), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def measure(side: str, folder: Path, warm: Path) -> None:
    """Load once in this process and print what it took. A tiny model goes first: imports are not loading."""
    load(side, warm)
    before = high_water_mb()
    start = time.perf_counter()
    model = load(side, folder)
    seconds = time.perf_counter() - start
    grown = int((high_water_mb() - before) * 2**20)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    print(json.dumps({"seconds": seconds, "bytes": grown, "kept": sum(t.nbytes for t in tensors.values())}))


def require_equal(folder: Path) -> int:
    """Stop unless both sides hold the same weights, bit by bit; returns how many quantized weights there are."""
    import torch
    from bitsandbytes.nn import Linear4bit

    ours, theirs = (load(side, folder).state_dict() for side in ("veneer", "bitsandbytes"))
    layers = [name for name, m in load("bitsandbytes", folder).named_modules() if isinstance(m, Linear4bit)]
    different = [n for n in theirs if "quant_state" not in n and not torch.equal(ours[n], theirs[n])]
    if ours.keys() != theirs.keys() or different or not layers:
        sys.exit(f"the two sides hold different weights: {different[:5] or ours.keys() ^ theirs.keys()}")
    return len(layers)


def tiny_model(folder: Path) -> Path:
    """A model of a few kilobytes of the same family."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def compare(folder: Path, n_rounds: int, scratch: Path) -> dict[str, float]:
    """Print the table, and return its ratios."""
    n_layers = require_equal(folder)
    print(f"{n_layers} quantized weights, equal bit by bit on both sides\n")
    warm = tiny_model(scratch)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(n_rounds):
        for side in SIDES:
            working(f"turn {turn + 1} of {n_rounds}, {side}")
            command = [sys.executable, "-m", "bench.files.load", str(folder), "--side", side, "--warm", str(warm)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(result.stdout.splitlines()[-1]))
    done()
    time_of = {side: statistics.median(run["seconds"] for run in runs[side]) for side in SIDES}
    memory_of = {side: statistics.median(run["bytes"] for run in runs[side]) for side in SIDES}
    print("| side | seconds (min–max) | peak memory, MB | kept, MB |\n| --- | --- | --- | --- |")
    for side in SIDES:
        seconds = [run["seconds"] for run in runs[side]]
        print(
            f"| {side} | {time_of[side]:.2f} ({min(seconds):.2f}–{max(seconds):.2f}) | {memory_of[side] / 1e6:.0f} "
            f"| {runs[side][0]['kept'] / 1e6:.0f} |"
        )
    faster = time_of["bitsandbytes"] / time_of["veneer"]
    smaller = memory_of["veneer"] / memory_of["bitsandbytes"]
    print(f"\ntime: {faster:.2f}× faster (target {TARGET_TIME}×); memory: {smaller:.2f}× (target {TARGET_MEMORY}×)")
    return {"time": faster, "memory": smaller}


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)
    add_keep(parser)
    arguments = parser.parse_args()
    ends_as_interrupted()
    if arguments.side:
        measure(arguments.side, arguments.folder, arguments.warm)
        return
    with tempfile.TemporaryDirectory() as scratch:
        keep(arguments.keep, compare(arguments.folder, arguments.rounds, Path(scratch)))


if __name__ == "__main__":
    main()
