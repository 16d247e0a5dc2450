"""8-bit AdamW by csrc/adamw; the reference computes dtypes that the kernel has no form for."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int32
from torch import Tensor

from veneer.errors import NonFiniteError
from veneer.ops.adamw import AdamWStep, Moment8bit
from veneer.ops.blockwise import dynamic_map
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.reference import adamw as reference

_FIRST_BIN, _LAST_BIN = 0x3400, 0x3F80  # the upper 16 bits of 2**-23 and of 1
_NEVER = 0xFFFF


@torch.no_grad()
def adamw_8bit_(param: Tensor, grad: Tensor, moments: tuple[Moment8bit, Moment8bit], hyper: AdamWStep) -> None:
    parts = [t for moment in moments for t in (moment.codes, moment.absmax)]
    if param.dtype not in DTYPES or grad.dtype not in DTYPES or not all(t.is_contiguous() for t in (param, *parts)):
        return reference.adamw_8bit_(param, grad, moments, hyper)
    grad = grad.contiguous()
    finite = kernels().adamw_8bit(
        param.data_ptr(),
        DTYPES[param.dtype],
        grad.data_ptr(),
        DTYPES[grad.dtype],
        param.numel(),
        *_places(moments[0], signed=True),
        *_places(moments[1], signed=False),
        hyper.lr,
        *hyper.betas,
        hyper.eps,
        hyper.weight_decay,
        hyper.step,
    )
    if not finite:
        raise NonFiniteError(f"a moment of a parameter of shape {tuple(param.shape)} became NaN or infinite")
    return None


def _places(moment: Moment8bit, signed: bool) -> tuple[int, int, int, int]:
    tables = dynamic_map(signed), code_bins(signed)
    return tuple(t.data_ptr() for t in (moment.codes, moment.absmax, *tables))  # type: ignore[return-value]


@cache
def code_bins(signed: bool) -> Int32[Tensor, " bins"]:
    """How the kernel finds the nearest code without a search: by the upper 16 bits of a value.

    A bin that narrow holds at most one of the midpoints between codes. Its entry is ``threshold << 8 | code``: the
    code of its smallest magnitude, and how large the lower 16 bits may be before the next code is nearer.
    """
    code = dynamic_map(signed)
    midpoints = (code[:-1] + code[1:]) / 2
    return torch.cat([_bins_of(midpoints, sign) for sign in ((1, -1) if signed else (1,))])


def _bins_of(midpoints: Tensor, sign: int) -> Tensor:
    upper = torch.arange(_FIRST_BIN, _LAST_BIN + 1, dtype=torch.int32)
    codes = torch.bucketize((upper << 16).view(torch.float32) * sign, midpoints).int()
    magnitudes = (midpoints * sign).clamp_min(0)
    at = codes if sign > 0 else codes - 1
    inside = at.clamp(0, len(midpoints) - 1)
    bits = magnitudes[inside].view(torch.int32)
    here = (at == inside) & ((bits >> 16) == upper)
    # Up, a midpoint itself belongs below; down, to the code beyond it: the lower one on a tie.
    threshold = torch.where(here, (bits & 0xFFFF) - int(sign < 0), _NEVER)
    return (threshold << 8) | codes
