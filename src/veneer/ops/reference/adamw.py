"""AdamW in plain torch.

All optimizers share `adam_moments_`, `adam_direction` and `adamw_update`, however they store the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit
from veneer.ops.blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise


def adam_moments_(grad: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float]) -> None:
    """Add one gradient to the moments, in place (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""
    beta1, beta2 = betas
    m.mul_(beta1).add_(grad * (1 - beta1))
    v.mul_(beta2).add_(grad.square().mul_(1 - beta2))


def adam_direction(m: Tensor, v: Tensor, hyper: AdamWStep) -> Tensor:
    """Return ``m̂ / (√v̂ + eps)``, bias-corrected."""
    beta1, beta2 = hyper.betas
    root = v.sqrt().div_((1 - beta2**hyper.step) ** 0.5).add_(hyper.eps)
    return (m / (1 - beta1**hyper.step)).div_(root)


def adamw_update(param: Tensor, m: Tensor, v: Tensor, hyper: AdamWStep) -> Tensor:
    """Return the parameter in float32 after decay and one step.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    return param.float() * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * adam_direction(m, v, hyper)


@torch.no_grad()
def adamw_8bit_(param: Tensor, grad: Tensor, moments: tuple[Moment8bit, Moment8bit], hyper: AdamWStep) -> None:
    m, v = (_read(moment, signed) for moment, signed in zip(moments, (True, False), strict=True))
    adam_moments_(grad.float().flatten(), m, v, hyper.betas)
    param.copy_(adamw_update(param.flatten(), m, v, hyper).view_as(param))
    for moment, value, signed in zip(moments, (m, v), (True, False), strict=True):
        codes, absmax = quantize_blockwise(value, dynamic_map(signed).to(value.device), BLOCK_SIZE)
        if not signed:
            codes = torch.where(value > 0, codes.clamp_min(1), codes)
        moment.codes.copy_(codes.view_as(moment.codes))
        moment.absmax.copy_(absmax)


def _read(moment: Moment8bit, signed: bool) -> Tensor:
    code = dynamic_map(signed).to(moment.codes.device)
    return dequantize_blockwise(moment.codes, moment.absmax, code, BLOCK_SIZE).flatten()
