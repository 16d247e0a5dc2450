"""4-bit kernels against bitsandbytes on the CPU, in one run: equality first, then A B A B, medians.

python bench/four_bit.py [--rows 1536] [--columns 576] [--repeats 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from veneer.ops.cpu.module import description
from veneer.ops.four_bit import FourBitLayout, dequantize_4bit, matmul_4bit, quantize_4bit

Pair = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    w = (torch.randn(args.rows, args.columns) * 0.02).bfloat16()
    check_equal(w)
    console = Console()
    console.print(
        f"W ({args.rows}, {args.columns}) bf16, NF4, blocks of 64; {description()}; bitsandbytes {bnb.__version__}"
    )
    table = Table("operation", "bitsandbytes ms", "veneer ms", "ratio")
    with torch.no_grad():
        for name, theirs, ours in pairs(w):
            a, b = alternate(theirs, ours, args.repeats)
            table.add_row(name, f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}x")
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def check_equal(w: Tensor) -> None:
    """Same codes, absmax and values as bitsandbytes, or stop."""
    packed, absmax = quantize_4bit(w, "nf4")
    theirs, state = bnb_functional.quantize_4bit(w, quant_type="nf4")
    values = dequantize_4bit(packed, absmax, FourBitLayout(tuple(w.shape), dtype=w.dtype))
    same = torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)
    if not same or not torch.equal(values, bnb_functional.dequantize_4bit(theirs, state)):
        raise SystemExit("codes, absmax or values differ from bitsandbytes: nothing to time")


def pairs(w: Tensor) -> list[Pair]:
    """(name, theirs, ours) for the codec and for products of 1, 8 and 512 rows."""
    packed, absmax = quantize_4bit(w, "nf4")
    layout = FourBitLayout(tuple(w.shape), dtype=w.dtype)
    theirs, state = bnb_functional.quantize_4bit(w, quant_type="nf4")
    found: list[Pair] = [
        (
            "quantize",
            lambda: bnb_functional.quantize_4bit(w, quant_type="nf4")[0],
            lambda: quantize_4bit(w, "nf4")[0],
        ),
        (
            "dequantize to bf16",
            lambda: bnb_functional.dequantize_4bit(theirs, state),
            lambda: dequantize_4bit(packed, absmax, layout),
        ),
    ]
    for rows in (1, 8, 512):
        x = torch.randn(rows, w.shape[1]).bfloat16()
        for mode, layer in (("layer in eval()", bnb_layer(w, False)), ("layer in train()", bnb_layer(w, True))):
            check_product(layer(x), x, dequantize_4bit(packed, absmax, layout))
            check_product(matmul_4bit(x, packed, absmax, layout), x, dequantize_4bit(packed, absmax, layout))
            found.append(
                (
                    f"multiply, {rows} rows, {mode}",
                    lambda layer=layer, x=x: layer(x),
                    lambda x=x: matmul_4bit(x, packed, absmax, layout),
                )
            )
    return found


def bnb_layer(w: Tensor, training: bool) -> bnb.nn.Linear4bit:
    """Their layer. In eval() without gradients it repacks its weight for a fused product; in train() it does not."""
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4")
    return layer.to("cpu").train(training)


def check_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    truth = x.double() @ w.double().T
    error = float((y.double() - truth).norm() / truth.norm())
    if error > 8e-3:  # bf16 rounds to 2e-3 on average, and bitsandbytes' fused product rounds absmax too
        raise SystemExit(f"a product is off by {error:.1e}: nothing to time")


def alternate(a: Callable[[], Tensor], b: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds of each, taken in turns, so that a slow minute of the machine hits both."""
    for run in (a, b):
        run()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, list_ in ((a, times[0]), (b, times[1])):
            list_.append(once(run))
    return statistics.median(times[0]), statistics.median(times[1])


def once(run: Callable[[], Tensor], calls: int = 10) -> float:
    """Milliseconds a call, the best of a few calls in a row."""
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


if __name__ == "__main__":
    main()
