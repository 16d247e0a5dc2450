"""Activation offload: tensors that autograd saves in a forward pass wait outside the device's memory for the backward.

For CUDA that is pinned host memory. For CPU runs it is a file, whose pages the system writes out and drops from memory
as needed. The idea is that of Rajbhandari et al. 2021 (arXiv 2104.07857, section 5.1.2), which offloads checkpoints.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.errors import DiskError
from veneer.ops.traced import Traced, not_done

Place = Literal["host", "disk"]
AT_LEAST = 1 << 18
"""Bytes; smaller tensors stay: handling them would cost more than they free."""


class ActivationOffload(saved_tensors_hooks):
    """Context for forward passes of a model, which moves saved activations elsewhere until the backward pass.

    Weights, and tensors smaller than ``at_least`` bytes, are not moved. ``place`` "host" is pinned host memory, "disk"
    an unnamed file in ``folder``. `close` frees the file's space. The forward pass raises DiskError if the file cannot
    grow.
    """

    def __init__(self, model: nn.Module, place: Place, folder: Path | None = None, at_least: int = AT_LEAST) -> None:
        super().__init__(self._pack, self._unpack)
        self.model, self.place, self.at_least = model, place, at_least
        self._file = PageFile(Path(tempfile.gettempdir()) if folder is None else folder)
        self._weights: set[int] = set()

    def __enter__(self) -> None:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self._weights = {_storage(tensor) for tensor in tensors}
        super().__enter__()

    def close(self) -> None:
        """Drop the file; the next forward pass makes another."""
        self._file.close()

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.nbytes < self.at_least or tensor.layout != torch.strided or _storage(tensor) in self._weights:
            return tensor
        if self.place == "disk":
            return self._file.write(tensor)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return _OnHost(host.copy_(tensor, non_blocking=True), tensor.device)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Page):
            return self._file.read(kept)
        if isinstance(kept, _OnHost):
            return kept.tensor.to(kept.device, non_blocking=True)
        tensor: Tensor = kept
        return tensor


@dataclass(frozen=True, slots=True)
class _OnHost:
    tensor: Tensor
    device: torch.device


def _storage(tensor: Tensor) -> int:
    return int(_memory(tensor)._cdata)


def _memory(tensor: Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "bare", tensor).untyped_storage()


class Page:
    """A tensor in a page file, as long as this object lives. ``order``: its dimensions from the outermost to the
    innermost.
    """

    def __init__(self, file: PageFile, offset: int, tensor: Tensor, order: list[int]) -> None:
        self.file, self.offset, self.n_bytes = file, offset, tensor.nbytes
        self.shape, self.dtype, self.device, self.order = tensor.shape, tensor.dtype, tensor.device, order
        self.is_traced = isinstance(tensor, Traced)

    def __del__(self) -> None:
        self.file.release()


class PageFile:
    """Unnamed file with tensors one after another. Once all of them are released, writing starts at the front again.

    Tensors of a trace have no values: their bytes are counted and not written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._end = self._n_live = 0
        self._known: dict[Any, tuple[StorageWeakRef, weakref.ref[Page]]] = {}

    def write(self, tensor: Tensor) -> Page:
        """Copy a tensor to the file, and return its page. If the same tensor was written before and has not changed,
        return the earlier page.

        Raises DiskError if the file cannot grow.
        """
        storage = StorageWeakRef(_memory(tensor))  # type: ignore[no-untyped-call]
        place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        key = storage.cdata, tensor._version, *place
        known = self._known[key][1]() if key in self._known and not self._known[key][0].expired() else None  # type: ignore[no-untyped-call]
        if known is not None:
            return known
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
        n_bytes = tensor.nbytes
        self._write_bytes(tensor.detach().permute(order).contiguous().cpu())
        page = Page(self, self._end, tensor, order)
        self._n_live += 1
        self._end += -(-n_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._known[key] = storage, weakref.ref(page)
        return page

    def read(self, page: Page) -> Tensor:
        """Return the tensor as a private mapping of the file: its pages are read on first access, and may be
        overwritten.
        """
        if page.is_traced:  # no memory of the process's own
            return Traced(torch.empty((), dtype=page.dtype, device="meta").expand(page.shape), page.device)
        mapping = mmap.mmap(self._opened(), page.n_bytes, flags=mmap.MAP_PRIVATE, offset=page.offset)
        laid = torch.frombuffer(mapping, dtype=page.dtype).view([page.shape[dim] for dim in page.order])
        back = sorted(range(len(page.order)), key=lambda position: page.order[position])
        return laid.permute(back).to(page.device)

    def release(self) -> None:
        """Count one tensor as no longer needed."""
        self._n_live -= 1
        if not self._n_live:
            self._end = 0
            self._known.clear()

    def close(self) -> None:
        """Free the file's space."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_bytes(self, tensor: Tensor) -> None:
        if isinstance(tensor, Traced):
            not_done("page_file_write", tensor.nbytes)
            return
        left = memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
        offset = self._end
        try:
            while left:
                written = os.pwrite(self._opened(), left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise DiskError(
                f"no room for {tensor.nbytes:,} bytes of activations after the {self._end:,} bytes written to "
                f"{self.folder} ({error.strerror}): make room there, choose a folder on a larger disk, or train "
                "without offload (gradient checkpointing or a smaller batch save memory too)"
            ) from error

    def _opened(self) -> int:
        if self._descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor, name = tempfile.mkstemp(dir=self.folder)
            os.unlink(name)  # the space is given back with the descriptor, whatever becomes of this process
        return self._descriptor
