"""RMSNorm and LayerNorm in plain torch: the specification. Statistics are in float32, or in x's dtype if wider."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    wide = x.to(_wide(x))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[..., None] * (weight.to(wide.dtype) + offset)).to(x.dtype), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    normed = x.to(rstd.dtype) * rstd[..., None]
    dy_wide = dy.to(rstd.dtype)
    dnormed = dy_wide * (weight.to(rstd.dtype) + offset)
    dx = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * rstd[..., None]
    return _sum(dx.to(x.dtype), added), _column_sum(dy_wide * normed, weight) if weight_grad else None


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(_wide(x))
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * weight.to(wide.dtype) + bias.to(wide.dtype)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    normed = (x.to(rstd.dtype) - mean[..., None]) * rstd[..., None]
    dy_wide = dy.to(rstd.dtype)
    dnormed = dy_wide * weight.to(rstd.dtype)
    along = normed * (dnormed * normed).mean(-1, keepdim=True)
    dx = _sum(((dnormed - dnormed.mean(-1, keepdim=True) - along) * rstd[..., None]).to(x.dtype), added)
    if not weight_grad:
        return dx, None, None
    return dx, _column_sum(dy_wide * normed, weight), _column_sum(dy_wide, weight)


def _sum(dx: Tensor, added: Tensor | None) -> Tensor:
    return dx if added is None else dx + added


def _column_sum(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).sum(0).to(like.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
