"""Launch of Triton kernels, and the tensors that they accept."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from veneer.errors import BackendError
from veneer.ops.memory import address

SERVED = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_ROW = 65536  # a row is held in one program's registers


def is_served(*tensors: Tensor) -> bool:
    """Return True if the training kernels support the dtypes of these tensors; the reference computes other dtypes."""
    return all(t.dtype in SERVED for t in tensors)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor; an empty grid runs nothing.

    Raises TensorError if an argument is a tensor without plain values in that device's memory, and BackendError if
    Triton refuses the kernel.
    """
    if 0 in grid:
        return
    device = "cuda" if args[0].is_cuda else "cpu"
    for x in args:
        if isinstance(x, Tensor):
            address(x, device)
    options.setdefault("enable_fp_fusion", True)
    with torch.cuda.device_of(args[0]):
        try:
            kernel[grid](*args, **options)
        except TritonError as error:
            raise BackendError(_refusal(kernel, error)) from error


def _refusal(kernel: Any, error: TritonError) -> str:
    name, said = getattr(kernel, "__name__", kernel), str(error).strip().splitlines()
    return (
        f"Triton {triton.__version__} refuses the kernel {name}: {said[-1] if said else type(error).__name__}. Install "
        "a Triton from 3.4 to 3.9, which compile it for compute capability 8.0 and newer, or uninstall triton: torch "
        "computes then"
    )


def launch_exact(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel as `launch` does, without fusing products and sums, so that a codec rounds as the reference does."""
    launch(kernel, grid, *args, enable_fp_fusion=False, **options)


def block(n: int, least: int = 1, most: int = 1 << 20) -> int:
    """Return the smallest power of two that holds n values, within bounds."""
    return max(least, min(most, int(triton.next_power_of_2(n))))


def warps(block_size: int) -> int:
    """Return the number of warps for a program that holds so many values: eight values a thread, up to 32 warps."""
    return max(1, min(32, block_size // 256))


def processors(x: Tensor) -> int:
    """Return the number of multiprocessors of x's device.

    It is 2 in the interpreter, so that sums over programs are exercised there too.
    """
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
