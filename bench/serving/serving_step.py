"""A greedy step of decoding, of the base's rows alone and with adapters: by the step in C++, and one instruction after
the other.

Both give the same logits and tokens, which is seen to before they are timed, in turns; medians. A step's bound is what
its weights, keys and values, and adapters' factors take at the rate of a copy, or its products at the rate of a large
product, whichever is more, measured in the same run. Of adapters the extra time is told, over their own such bound; and
of the call in C++ what the kinds of its parts take.

    python -m bench.serving.serving_step [--model NAME] [--dtype bfloat16] [--rows 32] [--context 64]
        [--adapters 0,1,16,32]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from torch import Tensor

from bench.paired import Rates, best_ms, measure_rates
from bench.report import Rows, working
from veneer.model.batch.paged import Stretch
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Effects
from veneer.ops.cpu.module import description
from veneer.records.deltas import LinearDelta
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import make_cache
from veneer.serve.program.step import Piece, step_of
from veneer.serve.runners.program_runner import proved
from veneer.store.source import load_model

BLOCK, RANK, LONGEST = 16, 16, 2048
CPU = torch.device("cpu")


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f"kernels: {description()}; torch {torch.__version__}")
    dtype = getattr(torch, args.dtype)
    rates = measure_rates(torch.randn(1 << 26).to(dtype), *torch.randn(2, 4096, 1024).to(dtype))
    print(f"rates: {rates.moved / 1e9:.0f} GB/s of a copy, {rates.flops / 1e9:.0f} GFLOP/s of products")
    load = Load(proved(load_model(args.model, dtype=args.dtype), LONGEST, give_up=True), args.rows, args.context)
    print(
        f"{args.rows} rows that see {args.context} tokens, {args.dtype}, adapters of rank {RANK} on all linear layers"
    )
    columns = (
        "by instruction ms",
        "C++ ms",
        "bound ms",
        "bound / C++",
        "extra ms",
        "own bound ms",
        "ratio",
    )
    rows, base = Rows(["adapters"], columns), 0.0
    for n in (int(number) for number in args.adapters.split(",")):
        working(f"{n} adapters")
        slow, fast = load.times(n, args.repeats)
        base = base or fast
        bound, own = load.bound_ms(n, rates), load.own_bound_ms(n, rates)
        extra = (f"{fast - base:.2f}", f"{own:.2f}", f"{(fast - base) / own:.2f}") if n else ("", "", "")
        rows.add(str(n), f"{slow:.2f}", f"{fast:.2f}", f"{bound:.2f}", f"{bound / fast:.0%}", *extra)
    print(f"the rows of a plan, made ready for a step: {load.planning_ms():.2f} ms")
    for n in (int(number) for number in args.adapters.split(",")):
        parts = ", ".join(f"{kind} {ms:.2f}" for kind, ms in load.parts_ms(n).items())
        print(f"within the call, {n} adapters, ms: {parts}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--adapters", default="0,1,16,32", help="numbers of distinct adapters, the first being 0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


class Load:
    """Sequences of some length in pages, each of which takes one more token."""

    def __init__(self, interpreter: Interpreter, rows: int, context: int) -> None:
        self.interpreter, self.rows, self.context = interpreter, rows, context
        self.native, self.program = interpreter.native, interpreter.program
        per = context // BLOCK + 1
        self.pages = [tuple(range(s * per, (s + 1) * per)) for s in range(rows)]
        self.cache = make_cache(self.program, rows * per, BLOCK, interpreter.dtype, CPU)
        self.ids = torch.randint(0, self.program.embedding.n_tokens, (rows,))
        for pages in self.pages:
            piece = Piece(Stretch(pages, 0, context), None, ())
            interpreter.run(
                step_of([piece], self.cache, CPU), torch.randint(0, self.program.embedding.n_tokens, (context,))
            )
        for number in range(rows):
            interpreter.take(str(number), interpreter.packed(self._adapter()))

    def _adapter(self) -> Effects:
        head, dtype = self.program.head.linear.path, self.interpreter.dtype
        layers = {path: layer for path, layer in self.program.linears.items() if path != head}
        self.adapter_bytes = sum(RANK * (x.in_features + x.out_features) * dtype.itemsize for x in layers.values())
        return Effects(
            linear={
                path: LinearDelta.pair(
                    a=(torch.randn(RANK, layer.in_features) * 0.02).to(dtype),
                    b=(torch.randn(layer.out_features, RANK) * 0.02).to(dtype),
                )
                for path, layer in layers.items()
            }
        )

    def step(self, n_adapters: int, *, picks: bool = True) -> PassRows:
        """The rows; of n adapters each has as many as the others, side by side. ``picks``: tokens, and no logits."""
        versions = [str(row * n_adapters // self.rows) if n_adapters else None for row in range(self.rows)]
        asked: tuple[tuple[int, ...], bool] = ((), True) if picks else ((0,), False)
        pieces = [Piece(Stretch(p, self.context, 1), v, *asked) for p, v in zip(self.pages, versions, strict=True)]
        return step_of(pieces, self.cache, CPU)

    def run(self, n_adapters: int, *, native: bool, picks: bool = True) -> Tensor:
        """Tokens, or logits."""
        self.interpreter.native = self.native if native else None
        step = self.step(n_adapters, picks=picks)
        logits = self.interpreter.run(step, self.ids)
        return step.tokens if picks else logits

    def times(self, n_adapters: int, repeats: int) -> tuple[float, float]:
        """Milliseconds instruction by instruction, and by the step in C++."""
        for picks in (True, False):
            slow, fast = (self.run(n_adapters, native=way, picks=picks) for way in (False, True))
            if not torch.equal(slow, fast):
                raise SystemExit(f"the results with {n_adapters} adapters differ")
        if n_adapters and torch.equal(fast, self.run(0, native=True, picks=False)):
            raise SystemExit(f"{n_adapters} adapters change no result: nothing is compared")
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for native, times in enumerate(found):
                times.append(best_ms(lambda native=native: self.run(n_adapters, native=bool(native)), 3))  # type: ignore[misc]
        return median(found[0]), median(found[1])

    def bound_ms(self, n_adapters: int, rates: Rates) -> float:
        """Return the bound of a whole step in ms."""
        weights = sum(layer.in_features * layer.out_features for layer in self.program.linears.values())
        keys = self.program.numbers_per_position * self.context * self.rows
        heads = sum(4 * part.heads.n_heads * part.heads.head_dim for part in self.program.attentions) * self.context
        moved = (weights + keys) * self.interpreter.dtype.itemsize + self.adapter_bytes * n_adapters
        return _bound_ms(moved, self.rows * (2 * weights + heads) + self._own_flops(n_adapters), rates)

    def own_bound_ms(self, n_adapters: int, rates: Rates) -> float:
        """Return the bound in ms of the work that adapters add to a step."""
        return _bound_ms(self.adapter_bytes * n_adapters, self._own_flops(n_adapters), rates)

    def _own_flops(self, n_adapters: int) -> int:
        return 2 * self.rows * self.adapter_bytes // self.interpreter.dtype.itemsize if n_adapters else 0

    def parts_ms(self, n_adapters: int, repeats: int = 20) -> dict[str, float]:
        """Return the ms a step of each kind of part in the call."""
        assert self.native is not None
        self.run(n_adapters, native=True)
        self.native.program.seconds()
        for _ in range(repeats):
            self.run(n_adapters, native=True)
        seconds, found = self.native.program.seconds(), dict[str, float]()
        for part in self.native.known:
            named = type(part.bound.operation).__name__
            found[named] = found.get(named, 0.0) + 1e3 * sum(seconds[i] for i in part.place) / repeats
        return found

    def planning_ms(self) -> float:
        return best_ms(lambda: self.step(min(16, self.rows)), 9)


def _bound_ms(moved: int, flops: int, rates: Rates) -> float:
    return max(moved / rates.moved, flops / rates.flops) * 1e3


if __name__ == "__main__":
    main()
