"""Packed whole numbers rounded to halves: equal but for the sign of zero, for every half as a scale and as a zero."""

from __future__ import annotations

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.bits import pack
from veneer.ops.code_groups import CodeGroups
from veneer.ops.packed_codes import PackedCodes
from veneer.quant.grouped import GroupedWeight
from veneer.quant.packing import packed_codes

OP = "packed_codes.matmul"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INPUTS = 32  # so many that each output has every number of 4 bits

EVERY = torch.arange(1 << 16).to(torch.int16).view(F16)
HALVES = EVERY[EVERY.isfinite()]
LARGEST = 65504


def drawn(like, least, most):
    """Halves of either sign, evenly spread over powers of two."""
    generator = torch.Generator().manual_seed(7)
    powers = torch.rand(len(like), generator=generator) * (most - least) + least
    return (torch.exp2(powers) * (torch.randint(2, (len(like),), generator=generator) * 2 - 1)).to(F16)


def every_scale(bits, zeros):
    """All scales whose products with ``2^bits`` and a zero stay finite, and whole zeros or none."""
    found = torch.arange(len(HALVES)) * 7 % 256 if zeros else torch.zeros(len(HALVES))
    fits = ((1 << bits) + found) * HALVES.float().abs() <= LARGEST
    return HALVES[fits], found[fits].to(torch.uint8) if zeros else None


def every_zero(bits, least, most):
    """All zeros whose differences from ``2^bits`` stay finite, and scales."""
    zeros = HALVES[(1 << bits) + HALVES.float().abs() <= LARGEST]
    return drawn(zeros, least, most), zeros


def zeros_within(bits):
    """Zeros as HQQ has them: differences are small, and their products subnormal."""
    return drawn(HALVES, -12, -5), drawn(HALVES, -9, bits).abs()


KINDS = {
    "every scale": lambda bits: every_scale(bits, True),
    "every scale, no zeros": lambda bits: every_scale(bits, False),
    "every zero": lambda bits: every_zero(bits, -24, 15.9),
    "zeros within": zeros_within,
}
kinds = pytest.mark.parametrize("kind", KINDS)
widths = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def weight(kind, bits):
    """A weight, and its values by torch's own arithmetic of halves."""
    scales, zeros = KINDS[kind](bits)
    step, outputs = 8 if bits == 8 else 1, torch.arange(len(scales))
    codes = (step * (torch.arange(INPUTS) + outputs[:, None]) % (1 << bits)).to(torch.uint8)
    held = None if zeros is None else zeros[:, None]
    frozen = GroupedWeight(pack(codes, bits), scales[:, None], bits, tuple(codes.shape), held)
    less = torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros.to(F16)
    return frozen, (codes.to(F16) - less[:, None]) * scales[:, None]


@widths
@kinds
def test_values_and_products_are_those_of_arithmetic_of_halves(kind, bits, every_backend):
    frozen, values = weight(kind, bits)
    assert values.isfinite().all() == (kind != "every zero")
    assert (values.abs() < 2.0**-14).any()
    made, wide = {dtype: packed_codes(frozen, dtype) for dtype in (F32, BF16)}, values.float()
    for backend in every_backend():
        for dtype, packed in made.items():
            assert torch.equal(packed.dense(backend=backend), wide.to(dtype)), (backend, dtype)
        if backend == "cpu":
            assert torch.equal(made[BF16].dense(F32, backend=backend), wide)
            assert torch.equal(made[F32].dense(F32, backend=backend), wide)
        require_picked(made[BF16], values, backend)


def require_picked(made, values, backend):
    """Products with rows of the identity are values. The reference decodes all for each product: it has one a dtype."""
    finite = values.isfinite().all(1)
    numbers = (slice(3, 4), slice(24, 25), slice(16), slice(32)) if backend == "cpu" else (slice(32),)
    for x_dtype in (F32, BF16):
        picks = torch.eye(INPUTS, dtype=x_dtype)
        expected = values[finite].float().to(BF16).to(x_dtype).T
        for rows in numbers:
            found = made.matmul(picks[rows], backend=backend)[:, finite]
            assert torch.equal(found, expected[rows]), (backend, x_dtype, rows)


def groups(numbers, scale, beside=None, formula="scaled", dtype=F16):
    codes, scales = torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[scale]], dtype=dtype)
    held = None if beside is None else torch.tensor([[beside]], dtype=dtype)
    return CodeGroups(codes, numbers, scales, held, formula, F16)


def test_infinite_halves_are_not_packed():
    for fits in (
        groups("signed4", 4094),
        groups("unsigned8", 0.1, 255, "less_zero"),
        groups("unsigned3", 60000, 65472, "apart"),
        groups("e4m3", 60000),
    ):
        assert fits.halves_fit
        assert PackedCodes.pack_groups([fits], F32).shape == (1, 16)
    for other in (
        groups("signed4", 4096),
        groups("signed4", -4096),
        groups("unsigned8", 128, 256, "less_zero"),
        groups("unsigned3", 1, -65504, "apart"),
        groups("unsigned4", 1, 1, "added"),
        groups("iq4", 1),
        groups("signed4", 1, dtype=BF16),
    ):
        assert not other.halves_fit
        with pytest.raises(ShapeError, match="finite halves"):
            PackedCodes.pack_groups([other], F32)
    assert (
        packed_codes(
            GroupedWeight(torch.zeros(2, 8, dtype=torch.uint8), torch.full((2, 1), 5e4).half(), 4, (2, 16)), F32
        )
        is None
    )
