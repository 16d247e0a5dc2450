"""Levels and scales of ggml's blocks in plain torch: their values are those of ``ggml_values``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from veneer.ops.code_groups import CodeGroups
from veneer.ops.reference.ggml_packing import read_halves, unpack_bits, unpack_q3_scales, unpack_six_bits

BIAS = 127  # of E8M0
Packed = UInt8[Tensor, "blocks _"]


def _four_bit(numbers: str, packed: Packed) -> CodeGroups:
    return _scaled(unpack_bits(packed[:, 2:], 16, 4), numbers, _halves(packed[:, :2]))


def _q4_1(packed: Packed) -> CodeGroups:
    return _added(unpack_bits(packed[:, 4:], 16, 4), "unsigned4", *torch.split(_halves(packed[:, :4]), 1, dim=1))


def _fifth(packed: Packed, head: int) -> Tensor:
    """Decode levels of five bits. Four bytes after the first ``head`` ones hold the fifth bits; the bytes behind hold
    the lower four.
    """
    fifth = unpack_bits(packed[:, head : head + 4], 1, 1)
    return unpack_bits(packed[:, head + 4 :], 16, 4) | fifth << 4


def _q5_0(packed: Packed) -> CodeGroups:
    return _scaled(_fifth(packed, 2) - 16, "signed8", _halves(packed[:, :2]))


def _q5_1(packed: Packed) -> CodeGroups:
    return _added(_fifth(packed, 4), "unsigned8", *torch.split(_halves(packed[:, :4]), 1, dim=1))


def _q8_0(packed: Packed) -> CodeGroups:
    return _scaled(packed[:, 2:], "signed8", _halves(packed[:, :2]))


def _q2_k(packed: Packed) -> CodeGroups:
    scales, d = packed[:, :16].int(), read_halves(packed[:, 80:])
    levels = unpack_bits(packed[:, 16:80], 32, 2)
    return _added(levels, "unsigned2", d[:, :1] * (scales & 15), -(d[:, 1:] * (scales >> 4)))


def _q3_k(packed: Packed) -> CodeGroups:
    levels = unpack_bits(packed[:, 32:96], 32, 2) | unpack_bits(packed[:, :32], 32, 1) << 2
    steps = read_halves(packed[:, 108:]) * (unpack_q3_scales(packed[:, 96:108]) - 32)
    return _scaled(levels, "signed3", steps)


def _q4_k(packed: Packed) -> CodeGroups:
    return _added(unpack_bits(packed[:, 16:], 32, 4), "unsigned4", *_steps_and_minima(packed))


def _q5_k(packed: Packed) -> CodeGroups:
    levels = unpack_bits(packed[:, 48:], 32, 4) | unpack_bits(packed[:, 16:48], 32, 1) << 4
    return _added(levels, "unsigned8", *_steps_and_minima(packed))


def _q6_k(packed: Packed) -> CodeGroups:
    levels = unpack_bits(packed[:, :128], 64, 4) | unpack_bits(packed[:, 128:192], 32, 2) << 4
    scales = packed[:, 192:208].contiguous().view(torch.int8)
    return _scaled(levels - 32, "signed8", read_halves(packed[:, 208:]) * scales)


def _iq4_xs(packed: Packed) -> CodeGroups:
    scales = unpack_bits(packed[:, 4:8], 1, 4) | unpack_bits(packed[:, 2:4], 1, 2) << 4
    return _scaled(unpack_bits(packed[:, 8:], 16, 4), "iq4", read_halves(packed[:, :2]) * (scales - 32))


def _mxfp4(packed: Packed) -> CodeGroups:
    """Decode MXFP4. A block of zeros, whose exponent is meaningless, gets the scale 1; the code of -0 becomes that of
    0.
    """
    levels = unpack_bits(packed[:, 1:], 16, 4)
    levels = torch.where(levels == 8, 0, levels)
    zeros = (levels == 0).all(dim=1, keepdim=True)
    return _scaled(levels, "e2m1", torch.where(zeros, BIAS, packed[:, :1]))


def _steps_and_minima(packed: Packed) -> tuple[Tensor, Tensor]:
    """Return steps and minima of Q4_K and Q5_K. The minima are negated, since they are added."""
    d, (scales, minima) = read_halves(packed[:, :4]), unpack_six_bits(packed[:, 4:16])
    return d[:, :1] * scales, -(d[:, 1:] * minima)


def _scaled(levels: Tensor, numbers: str, steps: Tensor) -> CodeGroups:
    return CodeGroups(levels.to(torch.uint8), numbers, steps)


def _added(levels: Tensor, numbers: str, steps: Tensor, added: Tensor) -> CodeGroups:
    return CodeGroups(levels.to(torch.uint8), numbers, steps, added, "added")


def _halves(packed: Packed) -> Tensor:
    return packed.contiguous().view(torch.float16)


GROUPS: dict[str, Callable[[Packed], CodeGroups]] = {
    "Q4_0": lambda packed: _four_bit("signed4", packed),
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": lambda packed: _four_bit("iq4", packed),
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
