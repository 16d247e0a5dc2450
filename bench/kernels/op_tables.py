"""A run of ops beside a peer: its arguments, the rates of the machine, and a table of `Pair`s with their bounds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from bench.paired import Pair, Rates, alternate, measure_rates
from bench.report import Rows, working
from veneer.ops.cpu.module import description

MIN_REPEATS = 5


def parser_of(doc: str | None, parts: tuple[str, ...], repeats: int) -> argparse.ArgumentParser:
    """The arguments of every such script; ``parts`` are what ``--only`` chooses from."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=repeats, help=f"A B pairs per op; at least {MIN_REPEATS}")
    parser.add_argument("--only", choices=parts)
    return parser


@dataclass(frozen=True)
class OpTables:
    """Prints tables of pairs, each pair timed ``repeats`` times in turns."""

    console: Console
    rates: Rates
    repeats: int

    @classmethod
    def start(cls, repeats: int, weight: Tensor) -> OpTables:
        """Print the kernels in use and the machine's rates: a copy of a weight (rows, depth), a product with it."""
        console = Console(width=120)
        console.print(f"kernels: {description()}; torch {torch.__version__}")
        rates = measure_rates(weight, torch.randn(512, weight.shape[1]).to(weight.dtype), weight)
        console.print(
            f"rates: {rates.moved / 1e9:.0f} GB/s of a copy, {rates.flops / 1e9:.0f} GFLOP/s of bf16 products"
        )
        return cls(console, rates, max(repeats, MIN_REPEATS))

    def show(self, title: str, peer: str, pairs: Iterable[Pair], calls: int) -> None:
        """Print each pair's milliseconds, theirs and ours, the best of so many calls in a row, and its bound."""
        pairs = list(pairs)
        print(f"\n{title}")
        rows = Rows((pair.name for pair in pairs), (f"{peer} ms", "veneer ms", "ratio", "bound ms"))
        for pair in pairs:
            working(pair.name)
            theirs, ours = alternate(pair, self.repeats, calls)
            bound = f"{self.rates.bound_ms(pair):.3f}"
            rows.add(pair.name, f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.2f}x", bound)
