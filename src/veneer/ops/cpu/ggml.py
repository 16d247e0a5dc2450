"""ggml's types by csrc/ggml and csrc/coded. torch computes the plain types."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.ggml_types import GGML_TYPES
from veneer.ops.memory import address
from veneer.ops.reference import ggml as reference


def quantize(
    rows: Float[Tensor, "n c"], kind: str, importance: Float32[Tensor, " c"] | None
) -> tuple[UInt8[Tensor, "..."], int]:
    ggml_type = GGML_TYPES[kind]
    if ggml_type.block == 1:
        return reference.quantize(rows, kind, None)
    packed = torch.empty(rows.numel() // ggml_type.block, ggml_type.n_bytes, dtype=torch.uint8)
    weights = None if importance is None else importance.contiguous()
    scratch = torch.empty(0 if weights is None else len(rows))
    bad_row = kernels().ggml_quantize(
        address(rows),
        DTYPES[rows.dtype],
        *rows.shape,
        0 if weights is None else address(weights),
        address(scratch),
        ggml_type.number,
        address(packed),
    )
    return packed, int(bad_row)


def dequantize(
    packed: UInt8[Tensor, "n bytes"], kind: str, order: Int32[Tensor, " k"] | None
) -> Float32[Tensor, "k c"]:
    ggml_type = GGML_TYPES[kind]
    if ggml_type.block == 1:
        return reference.dequantize(packed, kind, order)
    columns = packed.shape[1] // ggml_type.n_bytes * ggml_type.block
    out = torch.empty(len(packed) if order is None else len(order), columns)
    kernels().ggml_decode(*_matrix(packed, order, len(out), columns), ggml_type.number, address(out))
    return out


def matmul(
    x: Float[Tensor, "n i"], packed: UInt8[Tensor, "o bytes"], kind: str, order: Int32[Tensor, " o"] | None
) -> Float[Tensor, "n o"]:
    ggml_type = GGML_TYPES[kind]
    if ggml_type.block == 1 or x.dtype == torch.float64:
        return reference.matmul(x, packed, kind, order)
    wide, out = x.float().contiguous(), torch.empty(len(x), len(packed))
    matrix = _matrix(packed, order, len(packed), x.shape[1])
    kernels().ggml_multiply(*matrix, ggml_type.number, address(wide), len(x), address(out))
    return out.to(x.dtype)


def _matrix(packed: Tensor, order: Tensor | None, n_rows: int, columns: int) -> tuple[int, ...]:
    """Return rows of blocks in the kernel's form: address, bytes of a row, order, and shape."""
    return address(packed), packed.shape[1], 0 if order is None else address(order), n_rows, columns
