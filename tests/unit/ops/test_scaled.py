"""Small numbers with scales: values by the formats' formulas, whatever the widths, and products with the values."""

from dataclasses import dataclass, replace

import pytest
import torch

from quantized_folders import FP4_VALUES, FP8_VALUES
from veneer.errors import ShapeError
from veneer.ops.scaled import ScaledCodes, decode_scaled, matmul_scaled

OP = "scaled.decode"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A format: rows of more than one piece of the kernel, whose last group is short where none divides them."""

    coding: str
    bits: int
    rounding: torch.dtype = F32
    zeros: torch.dtype | None = None
    columns: int = 1067
    group: int = 24
    height: int = 1
    scales: torch.dtype | None = None
    overall: str = ""


CASES = {
    **{f"whole {bits}": Case("whole", bits, F16, torch.uint8) for bits in (1, 2, 3, 4, 5, 6, 8)},
    "gptq": Case("whole", 4, F16, torch.uint8, 1088, 32),
    "hqq": Case("whole", 4, F16, F16, 1056, 16),
    "hqq, bfloat16": Case("whole", 3, BF16, BF16),
    "channels": Case("whole", 4, BF16, None, 1056, 1056),
    "mxfp4": Case("e2m1", 4, columns=1056, group=32, scales=torch.uint8),
    "nvfp4": Case("e2m1", 4, columns=1056, group=16, scales=torch.float8_e4m3fn, overall="divides"),
    "modelopt": Case("e2m1", 4, columns=1058, group=46, scales=torch.float8_e4m3fn, overall="multiplies"),
    "deepseek": Case("e4m3", 8, group=128, height=5),
    "one scale": Case("e4m3", 8, BF16, group=1067, height=13),
    "e5m2": Case("e5m2", 8, F16, group=1067, scales=F16),
    "powers": Case("e5m2", 8, group=40, height=2, scales=torch.float8_e8m0fnu),
}
cases = pytest.mark.looped("case", CASES.values())


def stored(case: Case, n_rows: int = 13) -> tuple[ScaledCodes, torch.Tensor]:
    """A matrix of random codes, and its values by the formula in torch; the codes are packed one by one."""
    generator = torch.Generator().manual_seed(case.bits + case.columns)
    codes = torch.randint(1 << case.bits, (n_rows, case.columns), generator=generator)
    tables = {"whole": torch.arange(256.0), "e2m1": FP4_VALUES, "e4m3": FP8_VALUES[torch.float8_e4m3fn]}
    table = (tables | {"e5m2": FP8_VALUES[torch.float8_e5m2]})[case.coding]
    if case.coding == "e5m2":
        codes = torch.where(table[codes].isnan(), 0x85, codes)  # and no infinity
    packed = torch.tensor([list(stream(row, case.bits)) for row in codes.tolist()], dtype=torch.uint8)
    grid = (-(-n_rows // case.height), -(-case.columns // case.group))
    scales = ((torch.rand(grid, generator=generator) + 0.5) / 16).to(case.rounding)
    if case.scales in (torch.uint8, torch.float8_e8m0fnu):
        scales = torch.randint(100, 130, grid, generator=generator, dtype=torch.uint8).view(case.scales)
    elif case.scales is not None:
        scales = scales.to(case.scales)
    wide = 2.0 ** (scales.view(torch.uint8).float() - 127) if scales.itemsize == 1 else scales.float()
    wide = scales.float() if scales.dtype == torch.float8_e4m3fn else wide
    overall = torch.tensor(0.37) if case.overall else None
    if overall is not None:
        wide = wide / overall if case.overall == "divides" else wide * overall
    zeros, less = None, float(1 << case.bits - 1) if case.coding == "whole" else 0.0
    if case.zeros is not None:
        zeros = (torch.rand(grid, generator=generator) * (1 << case.bits)).to(case.zeros)
    places = torch.arange(n_rows)[:, None] // case.height, torch.arange(case.columns) // case.group
    apart = table[codes].to(case.rounding) - (less if zeros is None else zeros[places].to(case.rounding))
    values = (apart * wide[places].to(case.rounding)).float()
    w = ScaledCodes(
        packed, scales, case.columns, case.group, case.coding, case.bits, case.height, zeros, overall,
        case.overall == "divides", case.rounding,
    )  # fmt: skip
    return w, values


def stream(row: list[int], bits: int) -> bytes:
    """Codes as one stream of bits, filled up as `veneer.ops.bits` does."""
    word = 1 if 8 % bits == 0 else bits
    n = -(-len(row) * bits // (8 * word)) * word
    return sum(code << bits * place for place, code in enumerate(row)).to_bytes(n, "little")


@cases
def test_values_are_those_of_the_formula(case, backend):
    w, values = stored(case)
    assert torch.equal(decode_scaled(w, slice(None), backend=backend).nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(decode_scaled(w, slice(3, 9), backend=backend).nan_to_num(7.0), values[3:9].nan_to_num(7.0))
    order = torch.tensor([12, 0, 7, 12])
    assert torch.equal(decode_scaled(w, order, backend=backend).nan_to_num(7.0), values[order].nan_to_num(7.0))
    assert decode_scaled(w, slice(5, 5), backend=backend).shape == (0, case.columns)


@pytest.mark.looped("name", ["gptq", "hqq, bfloat16", "nvfp4", "deepseek"])
@pytest.mark.looped("dtype", [F32, BF16, torch.float64])
def test_products_are_those_with_the_values_in_any_batch(name, dtype, backend):
    """Of more rows than the kernel takes at a time, of W and of x; rows of a batch are those of each alone."""
    w, values = stored(CASES[name])
    w, values = (replace(w, codes=w.codes % 0x70), None) if w.coding == "e4m3" else (w, values)  # no NaN
    exact = decode_scaled(w, slice(None), backend="reference").double()
    x = torch.randn(19, w.columns, generator=torch.Generator().manual_seed(4)).to(dtype)
    y, right = matmul_scaled(x, w, backend=backend), x.double() @ exact.T
    assert y.dtype == dtype
    assert float((y.double() - right).norm()) <= max(torch.finfo(dtype).eps, 1e-6) * float(right.norm())
    if backend == "cpu" and dtype != torch.float64:
        assert torch.equal(torch.cat([matmul_scaled(row[None], w) for row in x]), y)


def test_what_does_not_fit_is_told(backend):
    w, _ = stored(CASES["gptq"])
    with pytest.raises(ShapeError, match=r"rows of 4 bits take 545 bytes"):
        replace(w, columns=1089, group=33)
    with pytest.raises(ShapeError, match=r"must be contiguous.*scales are torch.float16 \(13, 34\), not 468 of"):
        replace(w, scales=w.scales.repeat(1, 2)[:, ::2], zeros=None, group=31)
    with pytest.raises(ShapeError, match="'e3m2' of 6 bits"):
        replace(w, coding="e3m2", bits=6)
    with pytest.raises(IndexError, match="row 13 is not in the table: it has rows 0 to 12"):
        decode_scaled(w, torch.tensor([0, 13]), backend=backend)
    with pytest.raises(ShapeError, match=r"x must be \(n, 1088\)"):
        matmul_scaled(torch.ones(2, 1087), w, backend=backend)
