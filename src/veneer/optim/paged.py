"""8-bit AdamW with evictable state: pages of a file for CPU runs, pinned host memory for CUDA.

QLoRA's paged optimizer (Dettmers et al. 2023, arXiv:2305.14314, section 3) lets optimizer state be evicted when memory
is short and brought back for the update. On the CPU the state is a shared mapping of a temporary file: under pressure
the kernel writes its pages out and drops them. The pages of the next parameter are prefetched before each update.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import TrainingError
from veneer.optim.adam import Params
from veneer.optim.adamw_8bit import MIN_8BIT_SIZE, AdamW8bit

PAGED_FROM = 100_000
"""Parameters with fewer entries stay in memory, as in bitsandbytes: their pages would cost more than they free."""


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit with evictable state. ``folder`` holds the unnamed page file (default: the system's
    temporary folder).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        folder: Path | None = None,
        paged_from: int = PAGED_FROM,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size)
        self.folder, self.paged_from = folder, paged_from
        self._pages: dict[Tensor, list[mmap.mmap]] = {}
        self._next: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Meanwhile, prefetch the state's pages of the parameter that comes
        next.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._next = dict(itertools.pairwise(params))
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, after pending copies to host memory finish."""
        for device in {param.device for param in self.state if param.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state as `LeanAdamW` does. The pages of the previous state are freed."""
        self._pages.clear()
        super().load_state_dict(state_dict)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        for pages in self._pages.get(self._next.get(param, param), ()):
            pages.madvise(mmap.MADV_WILLNEED)
        on_gpu = self._to_device(param)
        super()._update(param, group)
        self._to_host(param, on_gpu)

    def _allocate(self, param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if param.numel() < self.paged_from:
            return super()._allocate(param, shape, dtype)
        if param.device.type == "cuda":
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        tensor, pages = map_tensor(shape, dtype, self.folder)
        self._pages.setdefault(param, []).append(pages)
        return tensor

    def _to_device(self, param: Tensor) -> dict[str, Tensor]:
        """Replace a CUDA parameter's pinned state by copies on the device, and return the pinned tensors; an empty dict
        if none are pinned.
        """
        state = self._state_of(param)
        if param.device.type != "cuda" or "state1" not in state or state["state1"].device.type == "cuda":
            return {}
        pinned = {k: v for k, v in state.items() if torch.is_tensor(v)}
        state.update({k: v.to(param.device, non_blocking=True) for k, v in pinned.items()})
        return pinned

    def _to_host(self, param: Tensor, pinned: dict[str, Tensor]) -> None:
        state = self.state[param]
        for key, host in pinned.items():
            host.copy_(state[key], non_blocking=True)
            state[key] = host


def map_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> tuple[Tensor, mmap.mmap]:
    """Return a tensor of zeros over an unnamed file, with its mapping. The system may evict it from memory.

    Raises TrainingError if the folder has no room for it.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    where = folder or tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            file.truncate(n_bytes)
            _reserve(file.fileno(), n_bytes)
        except OSError as error:
            raise TrainingError(
                f"no room for {n_bytes:,} bytes of optimizer pages in {where} ({error.strerror}): "
                "give PagedAdamW8bit a folder on a larger disk, or use AdamW8bit"
            ) from error
        pages = mmap.mmap(file.fileno(), n_bytes)
    return torch.frombuffer(pages, dtype=dtype).view(shape), pages


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Claim the disk space now, so that a full disk is an error here and not a bus error in the middle of a step."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
