"""Short convolutions of a served step: a row sees the tokens before it in its sequence's pages.

The inputs of all tokens are kept, by layer, in pages with the numbers of the keys' pages. So whatever holds for keys
holds for them: pages are shared by equal beginnings, given back, and written again after a draft was taken back.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.memory import discard_pages, empty_pages
from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.conv import ConvKernel, GatedInput, require_fitting


@dataclass(frozen=True, slots=True, eq=False)
class WindowStore:
    """Inputs of short convolutions (n_pages, n_layers, block, d), and the mapping that holds them on a CPU."""

    data: Float[Tensor, "n_pages n_layers block d"]
    memory: mmap.mmap | None = None

    @classmethod
    def zeros(
        cls, n_pages: int, n_layers: int, block: int, d: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> WindowStore:
        """Return empty pages. On a CPU a page takes memory when it is first written."""
        data, memory = empty_pages(n_pages, n_layers * block * d, dtype, device)
        return cls(data.view(n_pages, n_layers, block, d), memory)

    @property
    def n_pages(self) -> int:
        """Number of pages."""
        return self.data.shape[0]

    @property
    def block(self) -> int:
        """Tokens of a page."""
        return self.data.shape[2]

    def discard(self, pages: Iterable[int]) -> None:
        """Give the memory of pages back to the system, if it supports this. The pages are then zeros or unchanged."""
        discard_pages(self.memory, self.data[0].nbytes, pages)


def windowed_conv(
    store: WindowStore,
    layer: int,
    given: GatedInput,
    kernel: ConvKernel,
    rows: PagedRows,
    *,
    backend: str | None = None,
) -> Float[Tensor, "n d"]:
    """Return the output of `conv.conv_forward` for the rows of a step. Each row also reads the earlier tokens of its
    sequence, from its pages.

    The rows' own inputs are written into the pages of one layer. A row's result is the same, bit for bit, whatever the
    batch and the chunks of a prompt are. Raises ShapeError if the parts do not fit.
    """
    shape, known = (rows.n_rows, store.data.shape[3]), 0 <= layer < store.data.shape[1]
    parts = [part for part in given.tensors if part is not None]
    if not known or any(tuple(part.shape) != shape or part.dtype != store.data.dtype for part in parts):
        raise ShapeError(
            f"layer {layer} of windows {tuple(store.data.shape)} takes rows {shape} in {store.data.dtype}; given "
            f"{tuple(given.x.shape)} in {given.x.dtype}"
        )
    require_fitting(given, kernel, None)
    run = implementation("conv.windowed_conv", given.x.device, backend)
    y: Tensor = run(store, layer, given, kernel, rows)
    return y
