"""RMSNorm and LayerNorm by csrc/norm, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import norm as reference
from veneer.ops.rows import same_dtype, with_rows


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    if not is_served(x, weight):
        return reference.rms_norm_forward(x, weight, eps, offset)
    y, _, rstd = _forward(x, weight, None, eps, offset)
    return y, rstd


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if not is_served(x, weight, bias):
        return reference.layer_norm_forward(x, weight, bias, eps)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return _forward(x, weight, (bias, mean), eps, 0.0)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if not is_served(x, weight):
        return reference.rms_norm_backward(dy, x, weight, rstd, offset, weight_grad, added)
    dx, dweight, _ = _backward(dy, x, (weight, offset), (None, rstd), weight_grad, added)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not is_served(x, weight):
        return reference.layer_norm_backward(dy, x, weight, mean, rstd, weight_grad, added)
    return _backward(dy, x, (weight, 0.0), (mean, rstd), weight_grad, added)


def _forward(
    x: Tensor, weight: Tensor, bias_and_mean: tuple[Tensor, Tensor] | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = with_rows(x)
    weight = weight.contiguous()
    bias = bias_and_mean[0].to(weight.dtype).contiguous() if bias_and_mean else None
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = bias_and_mean[1] if bias_and_mean else rstd
    y = torch.empty(x.shape, dtype=x.dtype)
    kernels().norm_forward(
        address(rows),
        rows.stride(0),
        *rows.shape,
        DTYPES[x.dtype],
        address(mean) if bias_and_mean else 0,
        address(rstd),
        address(weight),
        0 if bias is None else address(bias),
        DTYPES[weight.dtype],
        offset,
        eps,
        address(y),
    )
    return y, mean, rstd


def _backward(
    dy: Tensor,
    x: Tensor,
    weight_and_offset: tuple[Tensor, float],
    statistics: tuple[Tensor | None, Tensor],
    weight_grad: bool,
    added: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, dy_rows = with_rows(x), with_rows(same_dtype(dy, x))
    weight, offset = weight_and_offset[0].contiguous(), weight_and_offset[1]
    mean, rstd = statistics
    dx = torch.empty(x.shape, dtype=x.dtype)
    given = (
        address(rows),
        rows.stride(0),
        *rows.shape,
        DTYPES[x.dtype],
        0 if mean is None else address(mean),
        address(rstd),
    )
    gradient = address(dy_rows), dy_rows.stride(0)
    kernels().norm_backward(*given, address(weight), DTYPES[weight.dtype], offset, *gradient, address(dx))
    dx = dx if added is None else dx.add_(added)
    if not weight_grad:
        return dx, None, None
    dweight, dbias = torch.empty(2, weight.shape[0], dtype=torch.float32)
    kernels().norm_weight_grad(*given, *gradient, address(dweight), 0 if mean is None else address(dbias))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
