"""ggml's types by csrc/ggml. torch computes the plain types, and dequantizes blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
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


dequantize = reference.dequantize
