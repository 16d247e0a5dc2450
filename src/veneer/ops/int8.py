"""Int8 weights with one scale a row: ``W[o, i] = codes[o, i] * absmax[o] / 127``.

Source: Dettmers, Lewis, Belkada, Zettlemoyer 2022, LLM.int8(), arXiv:2208.07339, section 2. bitsandbytes stores
``absmax`` as SCB.
Difference from the paper: activations stay in their dtype. The paper quantizes them too, except outlier columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from veneer.errors import NonFiniteError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.product import recorded_product, visible

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_int8(
    w: Float[Tensor, "o i"], *, backend: str | None = None
) -> tuple[Int8[Tensor, "o i"], Float32[Tensor, " o"]]:
    """Return the codes (each row times ``127 / absmax``, rounded to nearest, ties to even), and each row's absmax.

    A row of zeros has codes of zero. Raises ShapeError (not a matrix of float32, bfloat16 or float16), NonFiniteError.
    """
    if w.ndim != 2 or w.dtype not in FLOATS:
        raise ShapeError(f"quantize_int8 takes a matrix of {[str(d) for d in FLOATS]}, got {w.dtype} {tuple(w.shape)}")
    codes, absmax = implementation("int8.quantize_int8", w.device, backend)(w.detach().contiguous())
    bad = (~torch.isfinite(absmax)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"cannot quantize a weight of shape {tuple(w.shape)}: {len(bad)} rows hold NaN or infinity, the first is "
            f"row {int(bad[0])}. Save or fetch the weights again"
        )
    return codes, absmax


def dequantize_int8(
    codes: Int8[Tensor, "o i"],
    absmax: Float32[Tensor, " o"],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Float[Tensor, "o i"]:
    """Return ``codes * absmax * (1 / 127)`` in float32, then rounded to dtype. Raises ShapeError."""
    _check(codes, absmax, dtype)
    out: Tensor = implementation("int8.dequantize_int8", codes.device, backend)(codes, absmax, dtype)
    return out


def matmul_int8(
    x: Float[Tensor, "*batch i"],
    codes: Int8[Tensor, "o i"],
    absmax: Float32[Tensor, " o"],
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch o"]:
    """Return ``W x`` on the last axis in x's dtype; differentiable in x. Raises ShapeError."""
    _check(codes, absmax, x.dtype)
    _check_width(x, codes, 1)
    return _product(x, codes, absmax, False, backend)


def matmul_t_int8(
    dy: Float[Tensor, "*batch o"],
    codes: Int8[Tensor, "o i"],
    absmax: Float32[Tensor, " o"],
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch i"]:
    """Return ``Wᵀ dy`` on the last axis in dy's dtype: the gradient of `matmul_int8` in x; differentiable in dy."""
    _check(codes, absmax, dy.dtype)
    _check_width(dy, codes, 0)
    return _product(dy, codes, absmax, True, backend)


def _product(x: Tensor, codes: Tensor, absmax: Tensor, transposed: bool, backend: str | None) -> Tensor:
    def multiply(x: Tensor, transposed: bool) -> Tensor:
        return product_int8(x, codes, absmax, transposed, backend)

    return recorded_product(x, multiply, transposed)


@visible("product_int8(Tensor x, Tensor codes, Tensor absmax, bool transposed, str? backend) -> Tensor")
def product_int8(x: Tensor, codes: Tensor, absmax: Tensor, transposed: bool, backend: str | None) -> Tensor:
    """Return ``W x`` or ``Wᵀ x`` on the last axis, for checked arguments and without autograd."""
    run = implementation("int8.matmul_t_int8" if transposed else "int8.matmul_int8", x.device, backend)
    out: Tensor = run(x.reshape(-1, x.shape[-1]).contiguous(), codes, absmax)
    return out.view(*x.shape[:-1], out.shape[-1])


def _check(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
    problems = []
    if codes.dtype != torch.int8 or codes.ndim != 2 or not codes.is_contiguous():
        problems.append(f"codes must be a contiguous int8 matrix, got {codes.dtype} {tuple(codes.shape)}")
    if absmax.dtype != torch.float32 or tuple(absmax.shape) != tuple(codes.shape[:1]) or not absmax.is_contiguous():
        problems.append(f"absmax must be float32 with one value a row, got {absmax.dtype} {tuple(absmax.shape)}")
    if dtype not in FLOATS:
        problems.append(f"the result may be {[str(d) for d in FLOATS]}, got {dtype}")
    if problems:
        raise ShapeError("int8 weight: " + "; ".join(problems))


def _check_width(x: Tensor, codes: Tensor, axis: int) -> None:
    if x.ndim < 1 or x.shape[-1] != codes.shape[axis]:
        raise ShapeError(
            f"the last axis of {tuple(x.shape)} must be {codes.shape[axis]} for an int8 weight {tuple(codes.shape)}"
        )
