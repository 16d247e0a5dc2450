"""ggml's types in plain torch: the specification that the kernels are tested against."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.code_groups import CodeGroups
from veneer.ops.ggml_types import GGML_TYPES
from veneer.ops.reference import ggml_k, ggml_mxfp4, ggml_non_linear, ggml_simple
from veneer.ops.reference.ggml_groups import GROUPS
from veneer.ops.reference.ggml_search import ordered_sum, root
from veneer.ops.reference.ggml_values import READERS

CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALVES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}  # elsewhere a block's scales are its first bytes
AFFINE = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def quantize(
    rows: Float[Tensor, "n c"], kind: str, importance: Float32[Tensor, " c"] | None
) -> tuple[UInt8[Tensor, "..."], int]:
    """Return the bytes of the rows, and the index of the first row that float16 cannot hold, or -1.

    Such a row holds NaN, infinity or a value too large for float16.
    """
    if kind in CASTS:
        cast = rows.to(CASTS[kind])
        return cast.view(torch.uint8), _first_bad(cast.isfinite().all(dim=1))
    x, block = rows.float(), GGML_TYPES[kind].block
    blocks = x.reshape(-1, block)
    packed = _quantize_32(x, kind, importance) if block == 32 else _quantize_256(blocks, kind, _beside(x, importance))
    finite = blocks.isfinite().all(dim=1)
    if kind != "MXFP4":  # whose scale is an exponent
        begin, end = HALVES.get(kind, (0, 4 if kind in AFFINE else 2))
        finite &= packed[:, begin:end].contiguous().view(torch.float16).isfinite().all(dim=1)
    return packed, _first_bad(finite.view(len(rows), -1).all(dim=1))


def dequantize(
    packed: UInt8[Tensor, "n bytes"], kind: str, order: Int32[Tensor, " k"] | None
) -> Float32[Tensor, "k c"]:
    rows = packed if order is None else packed.index_select(0, order)  # which takes no row from the end
    return READERS[kind](rows.view(-1, GGML_TYPES[kind].n_bytes)).view(len(rows), -1)


def matmul(
    x: Float[Tensor, "n i"], packed: UInt8[Tensor, "o bytes"], kind: str, order: Int32[Tensor, " o"] | None
) -> Float[Tensor, "n o"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ dequantize(packed, kind, order).to(wide).T).to(x.dtype)


def _quantize_32(x: Float32[Tensor, "n c"], kind: str, importance: Tensor | None) -> Tensor:
    blocks = x.reshape(-1, 32)
    if kind == "Q8_0":
        return ggml_simple.q8_0(blocks)
    if kind == "MXFP4":
        return ggml_mxfp4.mxfp4(blocks)
    if kind == "IQ4_NL":
        beside = _beside(x, importance)
        return ggml_non_linear.iq4_nl(blocks, None if beside is None else beside.reshape(-1, 32))
    w = None
    if importance is not None:
        variance = ordered_sum(x * x) / torch.full_like(x[:, 0], x.shape[1])  # of the row
        w = (importance * root(variance[:, None] + x * x)).reshape(-1, 32)
    quantize_blocks = ggml_simple.symmetric_blocks if kind.endswith("_0") else ggml_simple.affine_blocks
    return quantize_blocks(blocks, w, int(kind[1]))


def _quantize_256(blocks: Float32[Tensor, "blocks 256"], kind: str, beside: Tensor | None) -> Tensor:
    run = ggml_non_linear.iq4_xs if kind == "IQ4_XS" else getattr(ggml_k, kind.lower())
    packed: Tensor = run(blocks, None if beside is None else beside.reshape(-1, 256))
    return packed


def _beside(x: Float32[Tensor, "n c"], importance: Tensor | None) -> Float32[Tensor, "n c"] | None:
    """Return the importance, expanded to every value of the rows; None for None."""
    return None if importance is None else importance.expand_as(x)


def _first_bad(good: Tensor) -> int:
    return -1 if bool(good.all()) else int(good.int().argmin())


def groups(packed: UInt8[Tensor, "n bytes"], kind: str, order: Int32[Tensor, " k"] | None) -> CodeGroups:
    rows = packed if order is None else packed.index_select(0, order)
    found, n = GROUPS[kind](rows.reshape(-1, GGML_TYPES[kind].n_bytes)), len(rows)
    beside = None if found.beside is None else found.beside.reshape(n, -1)
    return replace(found, codes=found.codes.reshape(n, -1), scales=found.scales.reshape(n, -1), beside=beside)
