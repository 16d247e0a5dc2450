"""Short causal convolution by csrc/conv, in float32 and bfloat16; the reference computes others, and long kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.paged_attention import PagedRows
from veneer.ops.reference import conv as reference
from veneer.ops.rows import put_back, same_dtype, with_rows
from veneer.ops.state.conv import LONGEST, ConvKernel, GatedInput
from veneer.ops.state.windows import WindowStore


def conv_forward(given: GatedInput, kernel: ConvKernel, previous: Tensor) -> Tensor:
    if not _is_known(given, kernel):
        return reference.conv_forward(given, kernel, previous)
    y = torch.empty(given.x.shape, dtype=given.x.dtype)
    (sizes, _held), inputs = _sizes(given, kernel, previous), _rows(given)
    kernels().conv_forward(sizes, _places(*inputs), _places(y))
    return y


def windowed_conv(store: WindowStore, layer: int, given: GatedInput, kernel: ConvKernel, rows: PagedRows) -> Tensor:
    if not _is_known(given, kernel):
        return reference.windowed_conv(store, layer, given, kernel, rows)
    y = torch.empty(given.x.shape, dtype=given.x.dtype)
    (sizes, _held), inputs = _sizes(given, kernel, None), _rows(given)
    tables = (rows.pages, rows.first_page, rows.first_row, rows.position)
    kernels().conv_windowed(
        sizes,
        [address(store.data), *store.data.shape[1:3], layer],
        [len(rows.position), *map(address, tables)],
        _places(*inputs),
        _places(y),
    )
    return y


def conv_backward(
    dy: Tensor, given: GatedInput, kernel: ConvKernel, previous: Tensor, owns: tuple[bool, bool]
) -> tuple[GatedInput, Tensor]:
    if not _is_known(given, kernel):
        return reference.conv_backward(dy, given, kernel, previous, owns)
    dy, x, (owns_inputs, owns_dy) = same_dtype(dy, given.x), given.x, owns
    made = [t if owns_inputs or t is None else torch.empty(t.shape, dtype=t.dtype) for t in given.tensors]
    y = dy if owns_dy else torch.empty(x.shape, dtype=x.dtype)
    sums = torch.empty(x.shape, dtype=torch.float32)
    sizes, _held = _sizes(given, kernel, previous)
    rows, written = _rows(given), [None if t is None else with_rows(t) for t in (*made, y)]
    own = with_rows(dy)
    kernels().conv_backward(
        sizes, _places(own), _places(*rows), address(sums), _places(*written[:3]), _places(written[3])
    )
    for row, result in zip(written, (*made, y), strict=True):
        if row is not None and result is not None:
            put_back(row, result)
    before, dx, after = made
    assert dx is not None
    return GatedInput(dx, before, after), y


def _is_known(given: GatedInput, kernel: ConvKernel) -> bool:
    return is_served(given.x) and kernel.weight.shape[1] <= LONGEST


def _rows(given: GatedInput) -> list[Tensor | None]:
    return [None if t is None else with_rows(t) for t in given.tensors]


def _sizes(given: GatedInput, kernel: ConvKernel, previous: Tensor | None) -> tuple[list[int], list[Tensor | None]]:
    """Return the kernels' first arguments (sizes, dtype, activation, addresses), and the tensors at these addresses.

    The caller must keep these tensors and the tensors that `_rows` returns alive until the kernel has run.
    """
    weight, bias = kernel.values()
    previous = None if previous is None else previous.to(torch.int32).contiguous()
    places = [0 if t is None else address(t) for t in (previous, weight, bias)]
    sizes = [*given.x.shape, len(weight), DTYPES[given.x.dtype], int(kernel.activation == "silu"), *places]
    return sizes, [previous, weight, bias]


def _places(*rows: Tensor | None) -> list[int]:
    return [number for row in rows for number in ((0, 0) if row is None else (address(row), row.stride(0)))]
