"""Memory of tensors: the only source of addresses for kernels."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from veneer.errors import TensorError
from veneer.ops.traced import Traced, is_tracing


def address(x: Tensor, device: str = "cpu") -> int:
    """Return the address of x's first value, for a kernel that reads memory of a device ("cpu" or "cuda"); 0 if x is
    empty.

    Any strided tensor has one if it owns values or shares them: parameters, views, subclasses. Raises TensorError for
    others, among them FakeTensor, DTensor, tensors wrapped by a transform such as vmap, and sparse, meta and freed
    tensors.
    """
    if isinstance(x, Traced):
        return 0
    try:
        place = x.data_ptr()
    except RuntimeError:  # torch's word for a tensor without storage
        place = 0
    if (place or not x.numel()) and (x.is_cpu if device == "cpu" else x.is_cuda) and not x.is_neg():
        return place
    if is_tracing():  # nothing will read it: weights of a GPU beside a step that is traced as on a CPU
        return 0
    raise TensorError(f"kernels read plain tensors in memory; given {_told(x, device)}")


def whole_numbers(values: Sequence[int]) -> Tensor:
    """Return whole numbers as an int64 tensor, three times as fast as torch itself reads a list of them."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def empty_pages(
    n_pages: int, values: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, mmap.mmap | None]:
    """Return pages of zeros (n_pages, values), and the mapping that holds them on a CPU; None on another device.

    On a CPU, unlike torch.zeros, a page takes memory only when it is first touched.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(n_pages, values, dtype=dtype, device=device), None
    memory = mmap.mmap(-1, n_pages * values * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(n_pages, values), memory


def discard_pages(memory: mmap.mmap | None, page_bytes: int, pages: Iterable[int]) -> None:
    """Give the memory of pages back to the system, if it supports this. The pages are then zeros or unchanged."""
    if memory is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    for run in _runs(pages):
        start = -(-run.start * page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # neighbours are in use
        stop = run.stop * page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Yield the numbers as ranges of consecutive ones."""
    start = stop = 0
    for number in sorted(numbers):
        if number != stop:
            yield range(start, stop)
            start = number
        stop = number + 1
    yield range(start, stop)


def _told(x: Tensor, device: str) -> str:
    """Return the words of an error about a tensor that has no address on the device: its kind, and the call that gives
    one with an address.
    """
    if x.layout != torch.strided:
        return f"a tensor laid out as {x.layout}; call to_dense() on it"
    if x.device.type != device:
        return f"a tensor on {x.device}; the kernels here read memory of {device}: move all to one device with to()"
    if x.is_neg():
        return "a tensor whose values are read with the other sign; call resolve_neg() on it"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}, which holds no values itself; pass the tensor within (of a DTensor, to_local())"
    return "a tensor without memory: it was freed (sharded training does so), or a transform such as vmap wraps it"
