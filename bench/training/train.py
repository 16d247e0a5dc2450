"""A LoRA training step (r = 16 on all linear layers, 4 x 512 tokens, bfloat16) against the peers, in turns.

Four rows: a loop of its own over a dense and over an NF4 base, and ``trainer.train()`` on packed rows without and with
gradient checkpointing. For each row, both sides first take steps from factors that change the logits, whose losses and
gradients are compared. Then they train on the same rows for --steps steps and their losses are compared; only where
they agree are times given. Between the timed steps the machine's rate of products is taken (bf16
or float32, the faster), and with it the time that the products of one step need at least. Memory is the high-water mark
of a process of its own that loads the model and trains two steps.

    python -m bench.training.train --data shared/data/gsm8k/train.jsonl [--rows dense nf4 trainer checkpointing]
        [--model smollm2-135m-instruct] [--dtype bfloat16] [--steps 100] [--check-length 128] [--rounds 5]

Both sides compute in --dtype: float32 is the choice of those whose CPU has no bf16 products.

The file holds one chat a line ({"messages": [...]}). peft, trl and, for nf4, bitsandbytes must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from bench.lora_step import SIDES, agree
from bench.report import add_keep, done, ends_as_interrupted, keep, quiet_libraries, working
from bench.resident import forget_high_water, high_water_mb
from bench.same import require_same_gradients, saved, share_of, stir
from bench.training.train_sides import BATCH, ROWS, Row, Side, cycled, packed_rows, products_of, same_start, side_of
from bench.turns import Timing, faster_dtype, median, product_time
from veneer.store.source import resolve

LENGTH, TOLERANCE = 512, 0.02


@dataclass(frozen=True, slots=True)
class Peak:
    """Megabytes of resident memory: of a whole process that trains, and over the loaded model."""

    whole: float
    over_model: float


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    quiet_libraries()
    place = str(resolve(args.model))
    texts = read_chats(args.data, place)
    rows = packed_rows(texts, LENGTH)
    if args.peak:
        name, side = args.peak
        print(json.dumps(peak_here(side, row_of(name, args), place, rows)))
        return
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{threads} threads, torch {torch.__version__}, {args.model} in {args.dtype}, load {load:.1f}")
    figures: dict[str, float] = {}
    for name in args.rows:
        taken = measure(name, place, (packed_rows(texts, args.check_length), rows), args)
        figures |= {f"{name}, {key}": figure for key, figure in taken.items()}
    keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of both sides")
    parser.add_argument("--steps", type=int, default=100, help="steps whose losses are compared")
    parser.add_argument("--check-length", type=int, default=128, help="tokens in each of their four rows")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a side")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # the command's own: a process to measure memory in
    add_keep(parser)
    return parser.parse_args()


def row_of(name: str, args: argparse.Namespace) -> Row:
    return replace(ROWS[name], dtype=getattr(torch, args.dtype))


def read_chats(data: Path, place: str) -> list[list[int]]:
    """Token ids of every chat of a file, through the model's template, or as plain lines where it has none."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    chats = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    if tokenizer.chat_template is None:
        return [tokenizer("\n".join(turn["content"] for turn in chat))["input_ids"] for chat in chats]
    return [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]


def measure(name: str, place: str, rows: tuple[Dataset, Dataset], args: argparse.Namespace) -> dict[str, float]:
    """One row of the table: losses, then memory, then times; the ratios of time and memory."""
    row, (check, full) = row_of(name, args), rows
    print(f"\n{name}: veneer against {row.peer}", flush=True)
    peer, ours = (side_of(side, row, place) for side in SIDES)
    same_steps(name, peer, ours, cycled(check, 3 * BATCH))
    compare_losses(peer, ours, cycled(check, args.steps * BATCH))
    peaks = {side: peak_of(name, side) for side in SIDES}
    times: dict[str, list[Timing]] = {side: [] for side in SIDES}
    products = [product_time(2048, faster_dtype())]
    size = 2 * BATCH
    batches = [full.select(range(size * number, size * (number + 1))) for number in range(args.rounds + 1)]
    for turn, batch in enumerate(batches):
        for side_name, side in zip(SIDES, (peer, ours), strict=True):
            working(f"{name}: turn {turn} of {args.rounds}, {side_name}")
            times[side_name].append(side.timed(batch))
        products.append(product_time(2048, faster_dtype()))
    # The first round warms up.
    n_products = statistics.median(products_of(row, ours.model, batch) for batch in batches[1:])
    done()
    return report({side: taken[1:] for side, taken in times.items()}, peaks, n_products, products)


def same_steps(name: str, peer: Side, ours: Side, rows: Dataset) -> None:
    """Leave both sides at one start. SystemExit where, from a start that changes the logits, they part."""
    from peft import set_peft_model_state_dict

    start = saved(peer.model)
    same_start(ours.model, stir(peer.model))
    (theirs, expected), (own, found) = (side.checked(rows) for side in (peer, ours))
    require_same_gradients(name, expected, found, share_of(peer.model))
    agree(f"{name}: losses", theirs, own)
    set_peft_model_state_dict(peer.model, start)
    same_start(ours.model, peer.model)


def compare_losses(peer: Side, ours: Side, rows: Dataset) -> None:
    """Train both on the same rows; SystemExit where their losses part by more than bfloat16 rounds."""
    theirs, own = peer.losses(rows), ours.losses(rows)
    apart = [abs(a - b) for a, b in zip(theirs, own, strict=True)]
    print(
        f"losses of {len(own)} steps: {theirs[0]:.4f} to {theirs[-1]:.4f} (peer), {own[0]:.4f} to {own[-1]:.4f} "
        f"(veneer); apart by {statistics.mean(apart):.4f} in the mean, {max(apart):.4f} at most",
        flush=True,
    )
    if not max(apart) <= TOLERANCE:
        raise SystemExit(f"the losses part by more than {TOLERANCE}: no times are given")


def peak_of(name: str, side: str) -> Peak:
    """Return the peak of a fresh process that runs this script for one side."""
    command = [sys.executable, "-m", "bench.training.train", *sys.argv[1:], "--peak", name, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def peak_here(side: str, row: Row, place: str, rows: Dataset) -> tuple[float, float]:
    """The whole peak, loading included, and that of two steps over the loaded model."""
    built = side_of(side, row, place)
    loading = high_water_mb()
    forget_high_water()
    loaded = high_water_mb()
    built.losses(rows.select(range(2 * BATCH)))
    return max(loading, high_water_mb()), high_water_mb() - loaded


def report(
    times: dict[str, list[Timing]], peaks: dict[str, Peak], n_products: float, products: list[Timing]
) -> dict[str, float]:
    peer, ours = (median(times[side]) for side in SIDES)
    for side, taken in zip(SIDES, (peer, ours), strict=True):
        print(
            f"{side:7} {taken.wall:7.2f} s wall, {taken.cpu:7.2f} s CPU; peak memory {peaks[side].whole:6.0f} MB, "
            f"{peaks[side].over_model:6.0f} MB over the loaded model"
        )
    print(
        f"ratio   {peer.wall / ours.wall:7.2f}x wall, {peer.cpu / ours.cpu:7.2f}x CPU; "
        f"memory {peaks['veneer'].whole / peaks['peer'].whole:.2f}x, "
        f"{peaks['veneer'].over_model / peaks['peer'].over_model:.2f}x over the loaded model"
    )
    one = median(products)
    least = Timing(one.wall * n_products, one.cpu * n_products)
    shares = [f"{least.wall / side.wall:.0%} ({least.cpu / side.cpu:.0%} by CPU)" for side in (ours, peer)]
    print(
        f"bound   {least.wall:7.2f} s wall, {least.cpu:7.2f} s CPU for {n_products / 1e12:.2f} TFLOP of products at "
        f"{1e-12 / one.wall:.2f} TFLOP/s; of it veneer reaches {shares[0]}, the peer {shares[1]}; "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return {"time": peer.wall / ours.wall, "memory": peaks["veneer"].whole / peaks["peer"].whole}


if __name__ == "__main__":
    main()
