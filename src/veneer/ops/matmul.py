"""Products of matrices in 16 bits, computed in float32 if the CPU has no instruction for them.

An x86 CPU before AVX-512-BF16 multiplies bfloat16 at a fifth of its rate in float32 (with torch 2.13). Operands are
then widened, multiplied in float32 and rounded once, as a bfloat16 product with float32 accumulation rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.dispatch import kernel_isa
from veneer.ops.traced import traced_isa

FEW_ROWS = 4  # with fewer, widening the other matrix takes longer than the product
NARROW = (torch.bfloat16, torch.float16)


def float32_is_faster() -> bool:
    """Return True if this CPU (or the one that a step is traced for) multiplies float32 faster than 16 bits."""
    return (traced_isa() or _own_isa()) in ("avx2", "avx512")


@functools.cache
def _own_isa() -> str:
    return kernel_isa()


def widens(x: Float[Tensor, "*batch k"], dtype: torch.dtype) -> bool:
    """Return True if `matmul` computes in float32 for x in this dtype."""
    narrow = dtype in NARROW and x.device.type == "cpu" and float32_is_faster()
    return narrow and x.numel() >= FEW_ROWS * x.shape[-1]


def operand(x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Return x in the dtype in which `matmul` computes here, for a matrix used in several products."""
    return x.float() if widens(x, x.dtype) else x


def matmul(
    a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], dtype: torch.dtype, out: Tensor | None = None, scale: float = 1.0
) -> Float[Tensor, "n m"]:
    """Return ``scale * a b`` rounded to dtype, written into ``out`` if given. Either factor may be an `operand`.

    Nothing is recorded for a backward pass, and autocast has no effect.
    """
    a, b = _alike(a, b)
    place = out if out is not None and out.dtype == a.dtype else a.new_empty(a.shape[0], b.shape[1])
    # autocast passes by what is given a place; without beta what lies there is not read
    product = torch.mm(a, b, out=place) if scale == 1 else torch.addmm(place, a, b, beta=0, alpha=scale, out=place)
    if out is not None:
        return out if product is out else out.copy_(product)
    return product if product.dtype == dtype else product.to(dtype)


def add_matmul(
    y: Float[Tensor, "n m"], a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], scale: float = 1.0
) -> Float[Tensor, "n m"]:
    """Return ``y + scale * a b``, written into y."""
    a, b = _alike(a, b)
    return y.addmm_(a, b, alpha=scale) if a.dtype == y.dtype else y.add_(matmul(a, b, a.dtype), alpha=scale)


def converted(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], beside: Iterable[tuple[Tensor, Tensor]] = ()
) -> list[Tensor]:
    """Return each tensor in its dtype of ``dtypes``. A tensor that has this dtype already is returned itself.

    On a GPU one launch converts all others. ``beside`` holds pairs of a target and a source: the same launch copies
    each source into its target.
    """
    found = [
        x if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [*beside, *((to, x) for to, x in zip(found, tensors, strict=True) if to is not x)]
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [x for _, x in pairs])
    return found


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors in one dtype: the wider of b's dtype and the dtype of ``operand(a)``."""
    a = operand(a)
    if a.dtype == b.dtype:  # most are: each call of torch takes as long as a short product
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
