"""Values and times of a family's kernels, beside the peer's and float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu.families import FAMILIES
from bench.gpu.kernel_cases import CHECKED, TIMED, TINY, Case, Maker, Sizes
from bench.gpu.runner import figure
from bench.gpu.timing import in_turns, peak_bytes, replayed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(family: str, rehearsed: bool, tiny: bool) -> int:
    """Print the errors of each case in each dtype; return 1 if one does not hold."""
    wrong = 0
    for name, case in _cases(family, rehearsed, TINY if tiny else CHECKED):
        is_right, errors = holds(case)
        wrong += not is_right
        figure(name, **errors, holds="yes" if is_right else "NO")
    return int(bool(wrong))


def timed(family: str, rehearsed: bool) -> int:
    """Print the milliseconds of both sides of each case, and of ours without the host."""
    device = _device(rehearsed)
    for name, case in _cases(family, rehearsed, TIMED):
        calls = [_call(side, case.inputs) for side in (case.ours, case.peer)]
        ours, peer = in_turns(calls, device, 2 if rehearsed else 15)
        alone = replayed(calls[0], device)
        figure(
            name, ms=ours * 1e3, peer=case.peer_name, peer_ms=peer * 1e3, ratio=peer / ours,
            graph_ms="none" if alone is None else alone * 1e3, gb_per_s=_moved(case) / (alone or ours) / 1e9,
            mb=_held(calls[0], device), peer_mb=_held(calls[1], device),
        )  # fmt: skip
    return 0


def _device(rehearsed: bool) -> torch.device:
    return torch.device("cpu" if rehearsed else "cuda")


def _cases(family: str, rehearsed: bool, sizes: Sizes) -> Iterator[tuple[str, Case]]:
    warnings.filterwarnings("ignore")
    for dtype in (torch.float32,) if rehearsed else DTYPES:
        torch.manual_seed(0)
        maker = Maker(_device(rehearsed), dtype, "triton" if rehearsed else None, TINY if rehearsed else sizes)
        for case in FAMILIES[family](maker):
            yield f"{case.name}, {str(dtype).removeprefix('torch.')}", case


def holds(case: Case) -> tuple[bool, dict[str, float | str]]:
    """Return True if a case holds, and both sides' largest errors against float64, of the largest value."""
    if case.exact is not None:
        ours = _run(case.ours, case.inputs)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(ours, case.exact(), strict=True))
        return same, {"error": "0, to the bit" if same else "other bits", "peer_error": ""}
    torch.manual_seed(1)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in case.inputs]
    truth = _run(case.truth or case.peer, wide)
    ours, peer = (_errors(_run(side, case.inputs), truth) for side in (case.ours, case.peer))
    floor = 4 * torch.finfo(case.inputs[0].dtype).eps
    is_right = all(a <= 2 * b + floor for a, b in zip(ours, peer, strict=True))
    return is_right, {"error": max(ours), "peer_error": max(peer)}


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Infinite where values are not finite."""
    pairs = zip(found, truth, strict=True)
    apart = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs]
    return [error if error == error else float("inf") for error in apart]


def _run(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return outputs, and gradients in inputs that train. The output gradients are drawn alike for every dtype."""
    result = function(*inputs)
    outs = result if isinstance(result, tuple) else (result,)
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return outs
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(o.shape, generator=generator).to(leaves[0].device).bfloat16().to(o.dtype) for o in outs]
    return *(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, dys)


def _call(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [x for x in inputs if x.requires_grad]
    first = function(*inputs)
    outs = first if isinstance(first, tuple) else (first,)
    dys = [torch.randn_like(o) for o in outs] if leaves else []

    def call() -> object:
        result = function(*inputs)
        return torch.autograd.grad(result, leaves, dys) if leaves else result

    return call


def _held(call: Callable[[], object], device: torch.device) -> float:
    """The megabytes that a call holds at most beyond its inputs."""
    with peak_bytes(device) as peak:
        call()
    return peak() / 1e6


def _moved(case: Case) -> int:
    """The bytes of inputs and outputs, each once, gradients too: a kernel moves no fewer."""
    with torch.no_grad():
        result = case.ours(*case.inputs)
    outs = result if isinstance(result, tuple) else (result,)
    trains = any(x.requires_grad for x in case.inputs)
    tensors = [*case.inputs, *outs]
    return sum(x.nbytes for x in tensors) * (2 if trains else 1)
