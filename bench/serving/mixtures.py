"""Mixtures beside their bounds: the experts of a layer alone, and a greedy step of decoding of a whole mixture.

The experts alone are timed by transformers' grouped products, by veneer's op, and as a dense layer of equal active
size. The bound of the op is what the distinct experts that rows hit take at the rate of a product of one row, or their
products at the rate of a large packed product, whichever is more, measured in the same run. A step is timed as it is
served, with the model's own module for its experts, and of a dense model of equal active size; then with adapters on
attention and experts, the rows divided among them. Its bound is that of all weights and factors that its rows hit. That
most rows agree is seen to before they are timed. Times are CPU milliseconds of one thread, and of a served step also
milliseconds of the clock in brackets, in turns, medians; weights are random.

    python -m bench.serving.mixtures [--dtype bfloat16] [--rows 1,16,32,1024] [--rounds 5] [--adapters 16]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from bench.report import Rows, quiet_libraries
from veneer.model.batch.paged import Stretch
from veneer.model.blueprint.parts import Stack
from veneer.model.program import experts
from veneer.model.program.experts import MixExperts
from veneer.model.program.version import Effects
from veneer.ops.cpu.module import description
from veneer.ops.experts import PackedStack, Router, mix, route
from veneer.ops.glu import glu_forward
from veneer.ops.packed import PackedWeight
from veneer.records.deltas import LinearDelta
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import make_cache
from veneer.serve.program.step import Piece, step_of
from veneer.serve.runners.program_runner import proved

CPU = torch.device("cpu")
CONTEXT, RANK = 8, 16
AGREES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
LEAST_SECONDS = 0.2  # of a timing


class Size(NamedTuple):
    """Sizes of a mixture, with the layers of the model whose steps are timed."""

    hidden: int
    width: int
    n_experts: int
    top_k: int
    layers: int

    def __str__(self) -> str:
        return f"{self.n_experts} top {self.top_k}, {self.hidden} x {self.width}"


SIZES = (Size(256, 128, 32, 4, 4), Size(512, 256, 32, 4, 4), Size(512, 128, 128, 8, 4), Size(2048, 1024, 64, 8, 1))


def main() -> None:
    args = parse()
    quiet_libraries()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, rows = getattr(torch, args.dtype), [int(n) for n in args.rows.split(",")]
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; CPU milliseconds of one thread")
    rates = measured_rates(dtype, args.rounds)
    print(f"rates: {rates[0] / 1e9:.0f} GB/s read by a product of one row, {rates[1] / 1e9:.0f} GFLOP/s of products")
    names = [f"{size}, {n} rows" for size in SIZES for n in rows]
    with torch.no_grad():
        table = Rows(names, ("experts hit", "grouped_mm", "veneer", "bound", "veneer / bound", "dense"))
        for size in SIZES:
            half = Half(size, dtype)
            for n in rows:
                table.add(f"{size}, {n} rows", *half.row(n, rates, args.rounds))
        print("a step of decoding")
        columns = ("own module", "veneer", "own / veneer", "bound", "veneer / bound", "dense", "veneer / dense")
        table = Rows([f"{name}, {args.adapters} adapters" for name in names], columns)
        for size in SIZES:
            model = Model(size, dtype, args.adapters)
            for n in (n for n in rows if n <= 64):
                table.add(f"{size}, {n} rows", *model.row(n, 0, rates, args.rounds))
                table.add(
                    f"{size}, {n} rows, {args.adapters} adapters", *model.row(n, args.adapters, rates, args.rounds)
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", default="1,16,32,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=16)
    return parser.parse_args()


def cpu_ms(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """CPU milliseconds of each run, in turns."""
    return [cpu for cpu, _ in times(runs, rounds)]


def times(runs: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[float, float]]:
    """CPU milliseconds of each run and those of the clock, in turns."""
    calls, found = [], [list[tuple[float, float]]() for _ in runs]
    for run in runs:
        run()
        calls.append(max(1, int(LEAST_SECONDS / max(1e-6, _seconds(run, 1)[0]))))
    for _ in range(rounds):
        for run, n, own in zip(runs, calls, found, strict=True):
            own.append(_seconds(run, n))
    each = zip(found, calls, strict=True)
    return [(1e3 * median(cpu for cpu, _ in own) / n, 1e3 * median(wall for _, wall in own) / n) for own, n in each]


def _seconds(run: Callable[[], Any], n: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(n):
        run()
    return time.process_time() - cpu, time.perf_counter() - wall


def measured_rates(dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Bytes a second of a packed product of one row, and operations a second of one of many rows."""
    o, i, n = 16384, 2048, 512
    weight = PackedWeight.pack(torch.randn(o, i).to(dtype))
    few, many = torch.randn(1, i).to(dtype), torch.randn(n, i).to(dtype)
    one, all_rows = cpu_ms([lambda: weight.matmul(few), lambda: weight.matmul(many)], rounds)
    return weight.nbytes / one * 1e3, 2 * o * i * n / all_rows * 1e3


def require_alike(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Stop unless most rows agree: of nearly equal scores rounding in 16 bits may choose another expert."""
    each = (found.float() - right.float()).norm(dim=1) / right.float().norm(dim=1)
    error = float(each.median())
    if not error <= AGREES[dtype]:
        raise SystemExit(f"the sides differ by {error:.1e}, and are not timed")


class Half:
    """Experts of one layer."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        config = config_of(size)
        config._experts_implementation = "grouped_mm"
        self.module: Any = Qwen3MoeSparseMoeBlock(config).to(dtype).eval()
        for parameter in self.module.parameters():
            parameter.normal_(0, size.hidden**-0.5)
        experts = self.module.experts
        self.stacks = PackedStack.pack(experts.gate_up_proj), PackedStack.pack(experts.down_proj)
        active, d = size.width * size.top_k, size.hidden
        self.dense = [PackedWeight.pack(torch.randn(o, i).to(dtype)) for o, i in ((2 * active, d), (d, active))]

    def row(self, n: int, rates: tuple[float, float], rounds: int) -> list[str]:
        size, x = self.size, torch.randn(n, self.size.hidden).to(self.dtype)
        scores = torch.nn.functional.linear(x, self.module.gate.weight)
        ids, weights = route(scores, Router(n_experts=size.n_experts, top_k=size.top_k))

        def grouped() -> Tensor:
            y: Tensor = self.module.experts(x, ids, weights)
            return y

        def veneer() -> Tensor:
            return mix(x, ids, weights, self.stacks, "silu")

        def dense() -> Tensor:
            gate, up = self.dense[0].matmul(x).chunk(2, dim=1)
            return self.dense[1].matmul(glu_forward(gate, up, "silu"))

        require_alike(veneer(), grouped(), self.dtype)
        hit = int(torch.unique(ids).numel())
        values = 3 * size.hidden * size.width
        bound = 1e3 * max(hit * values * self.dtype.itemsize / rates[0], 2 * n * size.top_k * values / rates[1])
        own, ours, like = cpu_ms([grouped, veneer, dense], rounds)
        return [str(hit), f"{own:.2f}", f"{ours:.2f}", f"{bound:.2f}", f"{ours / bound:.2f}", f"{like:.2f}"]


def config_of(size: Size, *, dense: bool = False) -> Any:
    shape = {
        "vocab_size": 512, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64, "num_key_value_heads": size.hidden // 64, "head_dim": 64,
        "max_position_embeddings": 256, "intermediate_size": size.width * size.top_k,
    }  # fmt: skip
    if dense:
        return Qwen3Config(**shape)
    experts = {"moe_intermediate_size": size.width, "num_experts": size.n_experts, "num_experts_per_tok": size.top_k}
    return Qwen3MoeConfig(**shape, **experts, norm_topk_prob=True)


class Model:
    """A mixture as it is served and with its own module for its experts, and a dense model of equal active size."""

    def __init__(self, size: Size, dtype: torch.dtype, n_adapters: int) -> None:
        self.size, self.dtype = size, dtype
        mixture, dense = (
            AutoModelForCausalLM.from_config(config_of(size, dense=each)).to(dtype).eval() for each in (False, True)
        )
        served = proved(mixture, 200)
        own = Interpreter(mixture, served.program, served._packed)
        self.sides = served, own, proved(dense, 200)
        for side in self.sides:
            for number in range(n_adapters):
                side.take(str(number), side.packed(self._adapter(side, number)))

    def _adapter(self, side: Interpreter, number: int) -> Effects:
        drawn = torch.Generator().manual_seed(number)
        head, stacks = side.program.head.linear.path, list[Stack]()
        for operation in side.program.operations:
            stacks += operation.stacks if isinstance(operation, MixExperts) else ()
        shapes = {path: (x.out_features, x.in_features) for path, x in side.program.linears.items() if path != head}
        shapes |= {stack.path: stack.shape for stack in stacks}

        def pair(*first: int, o: int, i: int) -> LinearDelta:
            a, b = ((torch.randn(*first, *s, generator=drawn) * 0.02).to(self.dtype) for s in ((RANK, i), (o, RANK)))
            return LinearDelta.pair(a=a, b=b)

        return Effects(linear={path: pair(*first, o=o, i=i) for path, (*first, o, i) in shapes.items()})

    def row(self, n: int, n_adapters: int, rates: tuple[float, float], rounds: int) -> list[str]:
        served, own, dense = (self._step(side, n, n_adapters) for side in self.sides)
        require_alike(served(), own(), self.dtype)
        bound = self._bound_ms(own, n, n_adapters, rates)
        ours, theirs, like = times([served, own, dense], rounds)
        cells = f"{theirs[0]:.2f}", f"{ours[0]:.2f} ({ours[1]:.2f})", f"{theirs[0] / ours[0]:.1f}"
        return [*cells, f"{bound:.2f}", f"{ours[0] / bound:.2f}", f"{like[0]:.2f}", f"{ours[0] / like[0]:.1f}"]

    def _bound_ms(self, run: Callable[[], Tensor], n: int, n_adapters: int, rates: tuple[float, float]) -> float:
        """The time of the values that the rows hit, at the rate of a product of one row, or of their products."""
        chosen, size = list[Tensor](), self.size

        def watched(*given: Any) -> tuple[Tensor, Tensor]:
            ids, weights = route(*given)
            chosen.append(ids)
            return ids, weights

        with mock.patch.object(experts, "route", watched):
            run()
        versions = torch.arange(n) * n_adapters // n
        hit = sum(len(torch.unique(ids)) for ids in chosen)
        pairs = sum(len({(int(versions[r]), e) for r, row in enumerate(ids.tolist()) for e in row}) for ids in chosen)
        linears = self.sides[0].program.linears.values()
        rest = sum(x.out_features * x.in_features for x in linears)
        wide = sum(x.out_features + x.in_features for x in linears) - 512 - size.hidden
        of_expert = 3 * size.width * size.hidden
        of_pair = RANK * (3 * size.width + 2 * size.hidden)
        values, products = rest + hit * of_expert, n * (rest + len(chosen) * size.top_k * of_expert)
        if n_adapters:
            values += pairs * of_pair + min(n, n_adapters) * RANK * wide
            products += n * (len(chosen) * size.top_k * of_pair + RANK * wide)
        return 1e3 * max(values * self.dtype.itemsize / rates[0], 2 * products / rates[1])

    def _step(self, side: Interpreter, n: int, n_adapters: int) -> Callable[[], Tensor]:
        cache, drawn = make_cache(side.program, 2 * n + 2, 16, side.dtype, CPU), torch.Generator().manual_seed(n)
        ids = torch.randint(0, 512, (n * (CONTEXT + 1),), generator=drawn)
        before = [Piece(Stretch((row,), 0, CONTEXT), None, range(0)) for row in range(n)]
        side.run(step_of(before, cache, CPU), ids[n:])
        versions = [str(row * n_adapters // n) if n_adapters else None for row in range(n)]
        pieces = [Piece(Stretch((row,), CONTEXT, 1), versions[row], range(1)) for row in range(n)]
        step = step_of(pieces, cache, CPU)
        return lambda: side.run(step, ids[:n])


if __name__ == "__main__":
    main()
