"""Eight-bit blockwise codes over any sorted table of 256 values, and the dynamic tables.

Used for the states of 8-bit optimizers and for the absmax of double quantization.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861,
sections 2.1 to 2.3.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.dispatch import implementation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def dynamic_map(signed: bool = True) -> Float32[Tensor, "256"]:
    """Return the dynamic table, sorted: seven decades from 1e-7 to 1, each with twice as many values as the next lower
    one.

    The decade ``10**(i-6)``, i in 0..6, holds the midpoints of ``n+1`` even steps from 0.1 to 1. The signed table has n
    = 2**i and their negatives, the unsigned one n = 2**(i+1). With 0 and 1 the table has 256 values. The tensor is
    shared: do not write into it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (steps[:-1] + steps[1:]) / 2.0
        values += (10 ** (decade - 6) * middles).tolist()
        values += (-(10 ** (decade - 6)) * middles).tolist() if signed else []
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_blockwise(
    x: Float[Tensor, "..."], code: Float32[Tensor, "256"], block_size: int = 256, *, backend: str | None = None
) -> tuple[UInt8[Tensor, "..."], Float32[Tensor, " blocks"]]:
    """Return the index of the table value nearest to each ``x / absmax``, in x's shape, and the absmax of each block.

    x: any shape, float32, bfloat16 or float16, flattened row by row into blocks. A value at a midpoint takes the lower
    index; a block of zeros takes the index of 0. Raises ConfigError for a block size below 1, ShapeError for another
    dtype or a table of another form, and NonFiniteError for NaN or infinity in x.
    """
    _check(code, block_size, [code])
    if x.dtype not in FLOATS:
        raise ShapeError(f"quantize_blockwise takes {[str(d) for d in FLOATS]}, got {x.dtype}")
    run = implementation("blockwise.quantize_blockwise", x.device, backend)
    codes, absmax = run(x.detach().reshape(-1).contiguous(), code, block_size)
    if not bool(torch.isfinite(absmax).all()):
        raise NonFiniteError(
            f"cannot quantize a tensor of shape {tuple(x.shape)}: it holds NaN or infinity. Give finite values"
        )
    return codes.view(x.shape), absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, "..."],
    absmax: Float32[Tensor, " blocks"],
    code: Float32[Tensor, "256"],
    block_size: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
    offset: Float32[Tensor, ""] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """Return ``code[codes] * absmax`` of the block, in float32 and then rounded to dtype, in the shape of codes.

    ``offset`` is added to the rounded values.
    """
    _check(code, block_size, [codes, absmax])
    n_blocks = -(-codes.numel() // block_size)
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32 or tuple(absmax.shape) != (n_blocks,):
        raise ShapeError(
            f"dequantize_blockwise takes uint8 codes and float32 absmax ({n_blocks},) for {codes.numel()} codes "
            f"in blocks of {block_size}, got {codes.dtype} and {absmax.dtype} {tuple(absmax.shape)}"
        )
    if dtype not in FLOATS:
        raise ShapeError(f"dequantize_blockwise gives {[str(d) for d in FLOATS]}, got {dtype}")
    run = implementation("blockwise.dequantize_blockwise", codes.device, backend)
    out: Tensor = run(codes.reshape(-1), absmax, code, block_size, dtype, offset)
    return out.view(codes.shape)


def _check(code: Tensor, block_size: int, contiguous: list[Tensor]) -> None:
    if block_size < 1:
        raise ConfigError(f"block_size is {block_size}; it must be at least 1")
    if code.dtype != torch.float32 or tuple(code.shape) != (256,):
        raise ShapeError(f"a table of codes is float32 (256,), got {code.dtype} {tuple(code.shape)}")
    if not all(t.is_contiguous() for t in contiguous):
        raise ShapeError("blockwise codes, absmax and table must be contiguous; call .contiguous()")
