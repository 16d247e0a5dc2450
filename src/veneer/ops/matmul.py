"""Products of matrices in 16 bits, computed in float32 where the CPU has no instruction for them.

An x86 CPU before AVX-512-BF16 multiplies bfloat16 at a fifth of its rate in float32 (with torch 2.13). There operands
are widened, multiplied in float32 and rounded once, as a product in bfloat16 that accumulates in float32 rounds.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.dispatch import kernel_isa

FEW_ROWS = 8  # so few that widening the other matrix takes longer than the product
NARROW = (torch.bfloat16, torch.float16)


@functools.cache
def float32_is_faster() -> bool:
    """Whether this CPU multiplies float32 faster than 16 bits."""
    return kernel_isa() in ("avx2", "avx512")


def operand(x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """x in the dtype in which `matmul` computes here: for a matrix that takes part in several products."""
    widens = x.dtype in NARROW and x.device.type == "cpu" and float32_is_faster()
    return x.float() if widens and x.shape[0] >= FEW_ROWS else x


def matmul(
    a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], dtype: torch.dtype, out: Tensor | None = None
) -> Float[Tensor, "n m"]:
    """``a b`` rounded to dtype, into ``out`` where it is given. Either may have gone through `operand`.

    Nothing is recorded for a backward pass, and autocast changes nothing.
    """
    a = operand(a)
    product = _product(a, b, out if out is not None and out.dtype == a.dtype else None)
    return product.to(dtype) if out is None or product is out else out.copy_(product)


def add_matmul(y: Float[Tensor, "n m"], a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """``y + a b``, written into y."""
    a = operand(a)
    return y.addmm_(a, b.to(a.dtype)) if a.dtype == y.dtype else y.add_(_product(a, b, None))


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    place = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return torch.mm(a, b.to(a.dtype), out=place)  # autocast passes by what is given a place
