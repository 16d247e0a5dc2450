"""Every Triton kernel on an NVIDIA GPU, checked against float64 and timed against torch and bitsandbytes; whole steps.

Errors are held against float64, at most twice those of the peer's own code in the same dtype; codecs must give the
reference's very bits. Then 8-bit AdamW, and LoRA training steps over a dense and an NF4 base against PEFT and
bitsandbytes, whose losses must agree before times are given. Sides take turns; medians; memory is what a call holds at
most beyond its inputs. A few minutes.

    python -m bench.kernels.gpu [--model FOLDER] [--rounds 15] [--rehearse]

--model: a checkpoint for the training steps, in place of a Llama of 0.7 billion random weights.
--rehearse: the same at tiny sizes on the CPU in float32, kernels in Triton's interpreter: shows that the script runs,
and no more.

Exit status: 0 all checks hold; 1 one does not; 3 there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int("--rehearse" in sys.argv))  # read when triton is imported

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.kernels import gpu_step
from bench.kernels.gpu_cases import TINY, Case, Maker, Sizes, cases

NO_GPU = 3  # exit status
console = Console(width=150)


def main() -> None:
    args = arguments()
    if not args.rehearse and not torch.cuda.is_available():
        console.print("bench.kernels.gpu: there is no CUDA GPU here; nothing was checked and nothing measured.")
        sys.exit(NO_GPU)
    warnings.filterwarnings("ignore")
    device = torch.device("cpu" if args.rehearse else "cuda")
    console.print(f"{_name(device)}; torch {torch.__version__}")
    wrong = kernels(device, args) + steps(device, args)
    optimizers(device, args)
    console.print("\n".join(["failed:", *wrong]) if wrong else "all checks hold")
    sys.exit(1 if wrong else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "a rehearsal on the CPU, whose times mean nothing"


def kernels(device: torch.device, args: argparse.Namespace) -> list[str]:
    """One table a dtype; returns the names of the cases that do not hold."""
    wrong = []
    dtypes = [torch.float32] if args.rehearse else [torch.bfloat16, torch.float16, torch.float32]
    for dtype in dtypes:
        torch.manual_seed(0)
        maker = Maker(device, dtype, "triton" if args.rehearse else None, TINY if args.rehearse else Sizes())
        title = f"kernels, {str(dtype).removeprefix('torch.')}, forward and, where inputs train, backward"
        table = Table("op", "error", "peer's error", "ms", "peer's ms", "ratio", "MB", "peer's MB", "peer", title=title)
        for case in cases(maker):
            holds, errors = check(case)
            if not holds:
                wrong.append(f"{case.name}, {dtype}")
            table.add_row(case.name + ("" if holds else " FAILS"), *errors, *timed(case, device, args), case.peer_name)
        console.print(table)
    return wrong


def check(case: Case) -> tuple[bool, tuple[str, str]]:
    """Check a case; return True where it holds, and both sides' largest errors against float64.

    The errors are relative to the largest value.
    """
    if case.exact is not None:
        ours = run(case.ours, case.inputs)
        same = [torch.equal(a.cpu(), b) for a, b in zip(ours, case.exact(), strict=True)]
        return all(same), ("0, to the bit" if all(same) else "other bits", "")
    torch.manual_seed(1)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in case.inputs]
    truth = run(case.truth or case.peer, wide)
    ours, peer = (_errors(run(side, case.inputs), truth) for side in (case.ours, case.peer))
    floor = 4 * torch.finfo(case.inputs[0].dtype).eps
    holds = all(a <= 2 * b + floor for a, b in zip(ours, peer, strict=True))
    return holds, (f"{max(ours):.1e}", f"{max(peer):.1e}")


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Infinite where values are not finite."""
    pairs = zip(found, truth, strict=True)
    apart = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs]
    return [error if error == error else float("inf") for error in apart]


def run(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return outputs, and gradients in inputs that train. The output gradients are drawn alike for every dtype."""
    result = function(*inputs)
    outs = result if isinstance(result, tuple) else (result,)
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return outs
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(o.shape, generator=generator).to(leaves[0].device).bfloat16().to(o.dtype) for o in outs]
    return *(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, dys)


def timed(case: Case, device: torch.device, args: argparse.Namespace) -> list[str]:
    """Milliseconds of both sides, their ratio, and what each holds at most, in megabytes."""
    sides = [_call(side, case.inputs) for side in (case.ours, case.peer)]
    times: list[list[float]] = [[], []]
    for number in range(args.rounds + 3):  # the first three compile and warm up
        for taken, call in zip(times, sides, strict=True):
            seconds = _seconds(call, device)
            if number >= 3:
                taken.append(seconds)
    peaks = []
    for call in sides:
        with gpu_step.peak_bytes(device) as peak:
            call()
        peaks.append(f"{peak() / 1e6:.0f}")
    ours, peer = (statistics.median(taken) * 1e3 for taken in times)
    return [f"{ours:.3f}", f"{peer:.3f}", f"{peer / ours:.2f}x", *peaks]


def _call(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [x for x in inputs if x.requires_grad]
    first = function(*inputs)
    outs = first if isinstance(first, tuple) else (first,)
    dys = [torch.randn_like(o) for o in outs] if leaves else []

    def call() -> object:
        result = function(*inputs)
        return torch.autograd.grad(result, leaves, dys) if leaves else result

    return call


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def steps(device: torch.device, args: argparse.Namespace) -> list[str]:
    """Training steps; returns what does not hold."""
    lacking = [name for name in ("peft", "bitsandbytes") if find_spec(name) is None]
    if lacking:
        return [f"no training steps: their peer needs {' and '.join(lacking)}"]
    wrong = []
    table = Table("base", "side", "ms a step", "ratio", "MB", "losses", title="LoRA steps, r = 16 on all linear layers")
    with tempfile.TemporaryDirectory() as folder:
        place = args.model or Path(folder)
        if args.model is None:
            gpu_step.random_llama(place, args.rehearse)
        for base in ("dense", "nf4"):
            results = gpu_step.compare(base, place, device, args.rehearse)
            peer, ours = results["peer"], results["veneer"]
            apart = max(abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True))
            if not apart <= gpu_step.TOLERANCE:
                wrong.append(f"losses over the {base} base part by {apart:.3f}")
            for side, found in results.items():
                table.add_row(
                    base, side, f"{found.seconds * 1e3:.1f}", f"{peer.seconds / found.seconds:.2f}x",
                    f"{found.peak / 1e6:.0f}", f"{found.losses[0]:.4f} to {found.losses[-1]:.4f}",
                )  # fmt: skip
    console.print(table)
    return wrong


def optimizers(device: torch.device, args: argparse.Namespace) -> None:
    table = Table("optimizer", "parameters", "ms a step", title="optimizers")
    for name, step, count in gpu_step.optimizers(device, args.rehearse):
        times = [_seconds(step, device) for _ in range(args.rounds + 3)][3:]
        table.add_row(name, f"{count:,}", f"{statistics.median(times) * 1e3:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
