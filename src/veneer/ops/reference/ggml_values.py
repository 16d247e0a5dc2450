"""Values of ggml's blocks in plain torch, as llama.cpp decodes the bytes of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from veneer.ops.reference.ggml_mxfp4 import DOUBLED, half_powers
from veneer.ops.reference.ggml_non_linear import VALUES
from veneer.ops.reference.ggml_packing import read_halves, unpack_bits, unpack_q3_scales, unpack_six_bits

Packed = UInt8[Tensor, "blocks _"]
Values = Float32[Tensor, "blocks _"]


def _four_bit(packed: Packed, affine: bool) -> Values:
    head = read_halves(packed[:, : 4 if affine else 2])
    levels = unpack_bits(packed[:, 4 if affine else 2 :], 16, 4)
    return levels * head[:, :1] + head[:, 1:] if affine else (levels - 8) * head


def _five_bit(packed: Packed, affine: bool) -> Values:
    head = 4 if affine else 2
    d, fifth = read_halves(packed[:, :head]), unpack_bits(packed[:, head : head + 4], 1, 1)
    levels = unpack_bits(packed[:, head + 4 :], 16, 4) | fifth << 4
    return levels * d[:, :1] + d[:, 1:] if affine else (levels - 16) * d


def _q8_0(packed: Packed) -> Values:
    return packed[:, 2:].contiguous().view(torch.int8) * read_halves(packed[:, :2])


def _q2_k(packed: Packed) -> Values:
    scales, d = packed[:, :16].int(), read_halves(packed[:, 80:])
    return _affine(unpack_bits(packed[:, 16:80], 32, 2), d, scales & 15, scales >> 4)


def _q3_k(packed: Packed) -> Values:
    levels = unpack_bits(packed[:, 32:96], 32, 2) | unpack_bits(packed[:, :32], 32, 1) << 2
    return _symmetric(levels - 4, read_halves(packed[:, 108:]) * (unpack_q3_scales(packed[:, 96:108]) - 32))


def _q4_k(packed: Packed) -> Values:
    return _affine(unpack_bits(packed[:, 16:], 32, 4), read_halves(packed[:, :4]), *unpack_six_bits(packed[:, 4:16]))


def _q5_k(packed: Packed) -> Values:
    levels = unpack_bits(packed[:, 48:], 32, 4) | unpack_bits(packed[:, 16:48], 32, 1) << 4
    return _affine(levels, read_halves(packed[:, :4]), *unpack_six_bits(packed[:, 4:16]))


def _q6_k(packed: Packed) -> Values:
    levels = unpack_bits(packed[:, :128], 64, 4) | unpack_bits(packed[:, 128:192], 32, 2) << 4
    scales = packed[:, 192:208].contiguous().view(torch.int8)
    return _symmetric(levels - 32, read_halves(packed[:, 208:]) * scales)


def _iq4_nl(packed: Packed) -> Values:
    return _table(packed)[unpack_bits(packed[:, 2:], 16, 4)] * read_halves(packed[:, :2])


def _iq4_xs(packed: Packed) -> Values:
    scales = unpack_bits(packed[:, 4:8], 1, 4) | unpack_bits(packed[:, 2:4], 1, 2) << 4
    return _symmetric(_table(packed)[unpack_bits(packed[:, 8:], 16, 4)], read_halves(packed[:, :2]) * (scales - 32))


def _mxfp4(packed: Packed) -> Values:
    table = torch.tensor(DOUBLED, dtype=torch.float32, device=packed.device)
    return table[unpack_bits(packed[:, 1:], 16, 4)] * half_powers(packed[:, :1].int())


def _affine(levels: Tensor, d: Tensor, scales: Tensor, minima: Tensor) -> Values:
    """Return ``(d * scale) * level - d_min * minimum`` for each group."""
    step, low = (
        part.repeat_interleave(256 // scales.shape[1], dim=1) for part in (d[:, :1] * scales, d[:, 1:] * minima)
    )
    return step * levels - low


def _symmetric(levels: Tensor, steps: Tensor) -> Values:
    return steps.repeat_interleave(256 // steps.shape[1], dim=1) * levels


def _table(packed: Packed) -> Float32[Tensor, "16"]:
    return torch.tensor(VALUES, dtype=torch.float32, device=packed.device)


READERS: dict[str, Callable[[Packed], Values]] = {
    "F32": lambda packed: packed.view(torch.float32),
    "F16": lambda packed: packed.view(torch.float16).float(),
    "BF16": lambda packed: packed.view(torch.bfloat16).float(),
    "Q4_0": lambda packed: _four_bit(packed, affine=False),
    "Q4_1": lambda packed: _four_bit(packed, affine=True),
    "Q5_0": lambda packed: _five_bit(packed, affine=False),
    "Q5_1": lambda packed: _five_bit(packed, affine=True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
