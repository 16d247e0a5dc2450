"""Stage 0: the card, the versions, and the rates of a copy and of products, which bound every later figure.

python -m bench.gpu.machine [--rehearse]
"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu.runner import figure
from bench.gpu.timing import seconds_of

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger_kernel", "vllm")
PROGRAMS = ("nvcc", "compute-sanitizer", "ncu")


def main() -> None:
    rehearsed = "--rehearse" in sys.argv
    device = torch.device("cpu" if rehearsed else "cuda")
    figure("versions", python=platform.python_version(), **{name: _version(name) for name in PACKAGES})
    figure("programs", **{name: shutil.which(name) or "none" for name in PROGRAMS})
    if not rehearsed:
        card = torch.cuda.get_device_properties(device)
        capability = f"{card.major}.{card.minor}"
        figure(
            "card", name=card.name, capability=capability, memory_gb=card.total_memory / 1e9, cuda=torch.version.cuda
        )
        figure("processors", count=card.multi_processor_count, cards=torch.cuda.device_count())
    n = 1 << 20 if rehearsed else 1 << 30
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figure("copy", gb_per_s=2 * n / seconds_of(lambda: target.copy_(source), device) / 1e9)
    size = 128 if rehearsed else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = seconds_of(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        figure(f"product, {str(dtype).removeprefix('torch.')}", tflop_per_s=2 * size**3 / seconds / 1e12)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
