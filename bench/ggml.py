"""Quantizing to ggml's types beside ggml's own kernels (libgguf), on one thread and on several, with equal bytes.

Both sides read the same float32 matrix and are timed in turns, medians. ggml's kernels know no threads: they get the
rows in as many parts as veneer has threads, as llama-quantize does it.

    python bench/ggml.py [--threads 1 2] [--rows 512] [--columns 4096] [--repeats 5] [--types Q4_K Q6_K] [--isa avx2]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import libgguf
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from paired import Pair, alternate
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
    console = Console(width=120)
    for threads in args.threads:
        torch.set_num_threads(threads)
        console.print(f"kernels: {description()}; libgguf {version('libgguf')}")
        table = Table("type", "ggml, M/s", "veneer, M/s", "ratio", title=f"million values a second, {threads} threads")
        with ThreadPoolExecutor(threads) as pool:
            for pair in pairs(w, importance, args.types, pool, threads):
                theirs, ours = alternate(pair, args.repeats, 1)
                rates = (w.numel() / ms / 1e3 for ms in (theirs, ours))
                table.add_row(pair.name, *(f"{rate:.1f}" for rate in rates), f"{theirs / ours:.2f}x")
        console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--isa", choices=kernels().isas(), help="default: the best that this CPU has")
    return parser.parse_args()


def pairs(w: Tensor, importance: Tensor, types: list[str], pool: ThreadPoolExecutor, threads: int) -> Iterator[Pair]:
    """Each type without importance and with it, checked for equal bytes; Q8_0 has no use for it."""
    for kind in types:
        for weights in (None,) if kind == "Q8_0" else (None, importance):
            theirs = partial(theirs_of, w.numpy(), kind, None if weights is None else weights.numpy(), pool, threads)
            ours = partial(quantize_ggml, w, kind, weights)
            if not np.array_equal(theirs(), ours().numpy()):
                raise SystemExit(f"{kind}: bytes differ from ggml's; nothing to time")
            yield Pair(kind + (" with importance" if weights is not None else ""), theirs, ours, 0, 0)


def theirs_of(
    w: np.ndarray, kind: str, importance: np.ndarray | None, pool: ThreadPoolExecutor, threads: int
) -> np.ndarray:
    """ggml's bytes, the rows shared out among threads."""
    ggml_type = GGML_TYPES[kind]
    packed = np.empty((len(w), w.shape[1] // ggml_type.block * ggml_type.n_bytes), dtype=np.uint8)

    def run(part: slice) -> None:
        rows = w[part]
        libgguf.quantize_rows_into_raw(ggml_type.number, rows, packed[part], len(rows), w.shape[1], importance)

    bounds = [len(w) * i // threads for i in range(threads + 1)]
    list(pool.map(run, (slice(a, b) for a, b in pairwise(bounds))))
    return packed


if __name__ == "__main__":
    main()
