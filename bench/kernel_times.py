"""Every kernel against its peer in one run: 4-bit codec and products against bitsandbytes, training ops against torch.

Both sides are compared before they are timed, A B A B, medians. The bound of an op is the larger of what its bytes take
at the rate of a copy and its products at the rate of torch's matrix product, both measured in the same run.

    python bench/kernel_times.py [--threads 2] [--rows 1536] [--columns 576] [--repeats 9] [--only 4-bit|training]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table

from four_bit import four_bit_pairs
from paired import Pair, Rates, alternate, measure_rates
from training_ops import training_pairs
from veneer.ops.cpu.module import description

MIN_REPEATS = 5


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    console = Console(width=120)
    console.print(f"kernels: {description()}; torch {torch.__version__}")
    w = (torch.randn(args.rows, args.columns) * 0.02).bfloat16()
    rates = measure_rates(w, torch.randn(512, args.columns).bfloat16(), w)
    console.print(f"rates: {rates.moved / 1e9:.0f} GB/s copying W, {rates.flops / 1e9:.0f} GFLOP/s of bf16 products")
    if args.only != "training":
        title = f"W ({args.rows}, {args.columns}) bf16, NF4, blocks of 64"
        with torch.no_grad():
            console.print(table_of(title, "bitsandbytes", four_bit_pairs(w), rates, (args.repeats, 10)))
    if args.only != "4-bit":
        title = "forward and backward, 4 x 512 tokens of SmolLM2-135M"
        console.print(table_of(title, "torch", training_pairs(), rates, (args.repeats, 1)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=9, help=f"A B pairs per op; at least {MIN_REPEATS}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("4-bit", "training"))
    args = parser.parse_args()
    args.repeats = max(args.repeats, MIN_REPEATS)
    return args


def table_of(title: str, peer: str, pairs: Iterable[Pair], rates: Rates, turns: tuple[int, int]) -> Table:
    table = Table("operation", f"{peer} ms", "veneer ms", "ratio", "bound ms", title=title)
    for pair in pairs:
        theirs, ours = alternate(pair, *turns)
        numbers = (f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.2f}x", f"{rates.bound_ms(pair):.3f}")
        table.add_row(pair.name, *numbers)
    return table


if __name__ == "__main__":
    main()
