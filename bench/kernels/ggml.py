"""Quantizing to ggml's types beside ggml's own kernels (libgguf), on one thread and on several, with equal bytes.

Both sides read the same float32 matrix and are timed in turns, medians, on as many cores as threads. libgguf holds
Python's lock and starts threads of its own where it may use several cores: on one core it is in this process, for more
it gets processes, each with a share of the rows and a core of its own, and what they wrote stays there.

    python -m bench.kernels.ggml [--threads 1 2] [--rows 512] [--columns 4096] [--repeats 5] [--types Q4_K Q6_K]
        [--isa avx2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection

import libgguf
import numpy as np
import torch
from torch import Tensor

from bench.paired import Pair, alternate
from bench.report import Rows, add_keep, keep, working
from veneer.ops.cpu.module import description, kernels
from veneer.ops.ggml import quantize_ggml
from veneer.ops.ggml_types import GGML_TYPES

TYPES = [kind.name for kind in GGML_TYPES.values() if kind.block > 1]


def main() -> None:
    args = parse()
    if args.isa:
        kernels().use_isa(args.isa)
    torch.manual_seed(0)
    w, importance = torch.randn(args.rows, args.columns) * 0.02, torch.rand(args.columns) + 0.01
    figures: dict[str, float] = {}
    teams = {threads: team(w.numpy(), importance.numpy(), threads) for threads in args.threads}  # forked before threads
    print(f"kernels: {description()}; libgguf {version('libgguf')}")
    cores = sorted(os.sched_getaffinity(0))
    for threads, workers in teams.items():
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores[:threads])
        print(f"\nmillion values a second, threads: {threads}")
        rows = Rows([f"{kind} with importance" for kind in args.types], ("ggml", "veneer", "ratio"))
        for pair in pairs(w, importance, args.types, workers):
            working(f"{pair.name}, threads: {threads}")
            theirs, ours = alternate(pair, args.repeats, 2)
            figures[f"{pair.name}, {threads}"] = theirs / ours
            rates = (f"{w.numel() / ms / 1e3:.1f}" for ms in (theirs, ours))
            rows.add(pair.name, *rates, f"{theirs / ours:.2f}x")
    keep(args.keep, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--isa", choices=kernels().isas(), help="default: the best that this CPU has")
    add_keep(parser)
    return parser.parse_args()


def pairs(w: Tensor, importance: Tensor, types: list[str], workers: list[Connection]) -> Iterator[Pair]:
    """Each type without importance and with it, checked for equal bytes; Q8_0 has no use for it."""
    for kind in types:
        number = GGML_TYPES[kind].number
        for weights in (None,) if kind == "Q8_0" else (None, importance):
            ours = partial(quantize_ggml, w, kind, weights)
            theirs = partial(libgguf.quantize_rows, w.numpy(), number, None if weights is None else weights.numpy())
            if not np.array_equal(theirs(), ours().numpy()):
                raise SystemExit(f"{kind}: bytes differ from ggml's; nothing to time")
            name, weighted = (kind, False) if weights is None else (f"{kind} with importance", True)
            yield Pair(name, partial(ask, workers, (number, weighted)) if len(workers) > 1 else theirs, ours, 0, 0)


def team(w: np.ndarray, importance: np.ndarray, n: int) -> list[Connection]:
    """Processes that each hold a share of the rows and quantize it when they are asked."""
    context, workers = multiprocessing.get_context("fork"), []
    cores = sorted(os.sched_getaffinity(0))
    for number, share in enumerate(np.array_split(w, n)):
        ours, theirs = context.Pipe()
        core = cores[number % len(cores)]
        context.Process(target=serve, args=(theirs, share, importance, core), daemon=True).start()
        workers.append(ours)
    return workers


def serve(connection: Connection, rows: np.ndarray, importance: np.ndarray, core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        number, weighted = connection.recv()
        libgguf.quantize_rows(rows, number, importance if weighted else None)
        connection.send(None)


def ask(workers: list[Connection], what: tuple[int, bool]) -> None:
    for worker in workers:
        worker.send(what)
    for worker in workers:
        worker.recv()


if __name__ == "__main__":
    main()
