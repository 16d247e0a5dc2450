"""8-bit AdamW against torch's fused float32 AdamW and bitsandbytes' AdamW8bit on the CPU, and what each keeps;
GaLore's memory against full AdamW's, of its state and of whole training steps.

python -m bench.training.optim [--layers 6] [--hidden 576] [--repeats 9] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from bench.report import Rows, add_keep, keep, working
from bench.training.training_peak import peaks
from veneer.ops.cpu.module import description
from veneer.optim import AdamW8bit, GaLoreAdamW, PagedAdamW8bit
from veneer.optim.galore import GaLoreProjection

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    check_equal(args)
    console = Console()
    n = sum(p.numel() for p in parameters(args, torch.float32))
    console.print(f"{n:,} parameters in {args.layers} layers; {description()}; bitsandbytes {bnb.__version__}")
    columns = ("parameters", "ns a parameter", "time against torch", "state bytes a parameter")
    rows, figures = Rows(["veneer PagedAdamW8bit", "bitsandbytes AdamW8bit"], columns), {}
    for dtype in (torch.float32, torch.bfloat16):
        optimizers = contestants(args, dtype)
        working(f"optimizers over {dtype}")
        times = alternate(optimizers, args.repeats)
        optimizers["bitsandbytes AdamW8bit"], times["bitsandbytes AdamW8bit"] = bitsandbytes(args, dtype)
        for name, optimizer in optimizers.items():
            ratio = times[name] / times["torch AdamW, fused"]
            kept = f"{state_bytes(optimizer) / count(optimizer):.3f}"
            kind = str(dtype).removeprefix("torch.")
            figures[f"{name}, {kind}"] = ratio
            rows.add(name, kind, f"{times[name]:.2f}", f"{ratio:.2f}x", kept)
    console.print(galore_table(args))
    console.print(peak_table(args))
    keep(args.keep, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rank", type=int, default=None, help="of GaLore; a quarter of hidden where not given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_keep(parser)
    return parser.parse_args()


def parameters(args: argparse.Namespace, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The matrices of some layers of a small Llama, with gradients."""
    h, wide, narrow = args.hidden, args.hidden * 8 // 3, args.hidden // 3
    layer = [(h, h), (narrow, h), (narrow, h), (h, h), (wide, h), (wide, h), (h, wide)]
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=random).to(dtype)) for s in layer * args.layers]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=random) * 1e-3).to(dtype)
    return params


def contestants(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Optimizer]:
    return {
        "torch AdamW, fused": torch.optim.AdamW(parameters(args, torch.float32), fused=True, **SETTINGS),
        "veneer AdamW8bit": AdamW8bit(parameters(args, dtype), **SETTINGS),
        "veneer PagedAdamW8bit": PagedAdamW8bit(parameters(args, dtype), **SETTINGS),
    }


def bitsandbytes(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Optimizer, float]:
    """Return their optimizer after a step on a small matrix, and the seconds of a second one: it is slow on the CPU."""
    optimizer = bnb.optim.AdamW8bit(parameters(args, dtype)[1:2], **SETTINGS)
    optimizer.step()
    return optimizer, once(optimizer)


def check_equal(args: argparse.Namespace) -> None:
    """After one step, which reads no rounded state, parameters equal those of torch; or stop."""
    torch_side, *rest = contestants(args, torch.float32).values()
    torch_side.step()
    for optimizer in rest:
        optimizer.step()
        for ours, theirs in zip(params_of(optimizer), params_of(torch_side), strict=True):
            if float((ours - theirs).detach().abs().max()) > 2e-6:
                raise SystemExit(f"{type(optimizer).__name__} is off from torch's AdamW: nothing to time")


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def alternate(optimizers: dict[str, Optimizer], repeats: int) -> dict[str, float]:
    """Median nanoseconds a parameter of each, taken in turns, so that a slow minute of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(repeats + 1):
        for name, optimizer in optimizers.items():
            taken = once(optimizer)
            if turn > 0:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def once(optimizer: Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return (time.perf_counter() - start) * 1e9 / count(optimizer)


def count(optimizer: Optimizer) -> int:
    return sum(p.numel() for p in params_of(optimizer))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor of the state but bitsandbytes' tables, which all parameters share."""
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and "qmap" not in k]
    return sum(t.numel() * t.element_size() for t in tensors)


def galore_table(args: argparse.Namespace) -> Table:
    """The state that GaLore keeps for the same parameters, measured after one step."""
    rank = args.rank or args.hidden // 4
    projection = GaLoreProjection(rank=rank)
    full = torch.optim.AdamW(parameters(args, torch.float32), **SETTINGS)
    full.step()
    whole = state_bytes(full)
    table = Table("state", "MB", "against AdamW")
    table.add_row("torch AdamW", f"{whole / 1e6:.1f}", "1")
    for name, eight_bit in ((f"GaLore, rank {rank}", False), (f"GaLore, rank {rank}, 8-bit", True)):
        optimizer = GaLoreAdamW(parameters(args, torch.float32), projection=projection, eight_bit=eight_bit)
        optimizer.step()
        table.add_row(name, f"{state_bytes(optimizer) / 1e6:.1f}", f"{1 - state_bytes(optimizer) / whole:.1%} less")
    return table


def peak_table(args: argparse.Namespace) -> Table:
    """The rise of a process's memory above its weights in a few training steps, by optimizer."""
    found = peaks(args.layers, args.hidden, args.rank or args.hidden // 4)
    whole = found["torch AdamW"]
    table = Table("training step", "peak above the weights, MB", "against AdamW")
    for name, taken in found.items():
        table.add_row(name, f"{taken / 1e6:.0f}", f"{1 - taken / whole:.1%} less")
    return table


if __name__ == "__main__":
    main()
