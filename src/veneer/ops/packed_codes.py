"""Frozen weight in codes (NF4, FP4, int8, groups) in the layout that its product reads in one pass, with the scales."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.code_groups import BITS, FORMULAS, NUMBERS, SCALES, UNIT, CodeGroups
from veneer.ops.dispatch import implementation
from veneer.ops.four_bit import FourBitLayout
from veneer.ops.packed import BLOCK, BLOCKS, ROWS, check_product

CODINGS = ("dense", "nf4", "fp4", "int8", *NUMBERS)
"""As csrc/core/panels.h counts them."""
GROUP = UNIT
_ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALLEST, LARGEST = 1e-30, 1e30
"""Magnitudes of scales between which a CPU's own rounding to bfloat16, which flushes subnormal numbers, is exact."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedCodes:
    """Weight ``W (o, i)`` as codes in panels of 64 outputs, with one scale for every ``unit`` inputs of an output.

    A value is ``table[code] * absmax`` or ``code * absmax / 127`` in float32, or that of a `CodeGroups` with the same
    ``scales``, ``formula`` and ``rounding``. It is rounded to ``dtype``, float32 or bfloat16. `dequantize_4bit`,
    `dequantize_int8` and the formats of the groups give the same values. ``panels`` are bytes; csrc/packed/coded.h
    documents the layout.
    """

    panels: UInt8[Tensor, " bytes"]
    shape: tuple[int, int]
    coding: str
    unit: int
    dtype: torch.dtype
    scales: torch.dtype = torch.float32
    formula: str = "scaled"
    rounding: torch.dtype = torch.float32

    @classmethod
    def pack_4bit(
        cls,
        packed: UInt8[Tensor, "..."],
        absmax: Float32[Tensor, " blocks"],
        layout: FourBitLayout,
        dtype: torch.dtype,
        *,
        backend: str | None = None,
    ) -> PackedCodes:
        """Return the packed form of a matrix from `quantize_4bit`. Raises ShapeError if `fits_4bit` is False."""
        if not fits_4bit(absmax, layout, dtype):
            raise ShapeError(
                f"packed 4-bit codes need a width that is a multiple of {GROUP}, the dtype float32 or bfloat16, and "
                f"absmax from {SMALLEST} to {LARGEST}; given {layout.shape} and {dtype}"
            )
        o, i = layout.shape
        made = cls(
            absmax.new_empty(0, dtype=torch.uint8), (o, i), layout.quant_type, math.gcd(i, layout.block_size), dtype
        )
        pack = implementation("packed_codes.pack_4bit", packed.device, backend)
        return replace(made, panels=pack(made, packed.reshape(-1).contiguous(), absmax.contiguous(), layout.block_size))

    @classmethod
    def pack_int8(
        cls,
        codes: Int8[Tensor, "o i"],
        absmax: Float32[Tensor, " o"],
        dtype: torch.dtype,
        *,
        backend: str | None = None,
    ) -> PackedCodes:
        """Return the packed form of a matrix from `quantize_int8`. Raises ShapeError if `fits_int8` is False."""
        o, i = codes.shape
        if not fits_int8(codes, absmax, dtype):
            raise ShapeError(
                f"packed int8 codes need the dtype float32 or bfloat16, and absmax from {SMALLEST} to {LARGEST}; given "
                f"{(o, i)} and {dtype}"
            )
        made = cls(absmax.new_empty(0, dtype=torch.uint8), (o, i), "int8", i + -i % GROUP, dtype)
        pack = implementation("packed_codes.pack_int8", codes.device, backend)
        return replace(made, panels=pack(made, codes.contiguous(), absmax.contiguous()))

    @classmethod
    def pack_groups(cls, parts: Iterable[CodeGroups], dtype: torch.dtype) -> PackedCodes:
        """Return the packed form of a matrix given in parts of its rows. All parts except the last have a multiple of
        64 rows.

        Raises ShapeError if `fits_groups` is False for a part.
        """
        panels, rows, first = [], 0, None
        for groups in parts:
            first = groups if first is None else first
            if not fits_groups(groups, dtype) or rows % (BLOCKS * BLOCK):
                raise ShapeError(
                    f"codes in groups are packed whose width is a multiple of {GROUP}, for float32 or bfloat16, with "
                    f"scales from {SMALLEST} to {LARGEST} and finite halves, {BLOCKS * BLOCK} rows or a multiple at a "
                    f"time; given {tuple(groups.codes.shape)} behind {rows} rows for {dtype}"
                )
            made = _of_groups(groups, dtype)
            panels.append(implementation("packed_codes.pack_groups", groups.codes.device, "reference")(made, groups))
            rows += len(groups.codes)
        if first is None:
            raise ShapeError("no rows to pack: give at least one part")
        made = _of_groups(first, dtype)
        return replace(made, panels=torch.cat(panels), shape=(rows, made.shape[1]))

    @property
    def depth(self) -> int:
        """Number of codes of each output in the panels."""
        return -(-self.shape[1] // self.unit) * self.unit

    @property
    def output_bytes(self) -> int:
        """Bytes of an output in the panels."""
        return self.depth // self.unit * self.head_bytes + self.depth * self.bits // 8

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.coding == "int8" else BITS.get(self.coding, 4)

    @property
    def head_bytes(self) -> int:
        """Bytes of one output's unit besides its codes: a scale, and a second number if the formula has one."""
        return self.scales.itemsize * (1 if self.formula == "scaled" else 2)

    @property
    def coding_number(self) -> int:
        """Number by which csrc/core/panels.h knows the coding, dtype of scales, formula and rounding."""
        parts = (
            CODINGS.index(self.coding),
            SCALES.index(self.scales),
            FORMULAS.index(self.formula),
            _ROUNDING[self.rounding],
        )
        return sum(part << 4 * place for place, part in enumerate(parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, with their padding."""
        return self.panels.nbytes

    def codes(self, *, backend: str | None = None) -> UInt8[Tensor, "..."] | Int8[Tensor, "o i"]:
        """Return the codes before packing: 4-bit codes, two a byte (o * i / 2,); int8 codes (o, i); codes of groups,
        one a byte (o, i).
        """
        out: Tensor = implementation("packed_codes.codes", self.panels.device, backend)(self)
        return out

    def dense(self, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Float[Tensor, "o i"]:
        """Return the weight, rounded to its own dtype or to a given one."""
        wide = replace(self, dtype=torch.float32) if dtype not in (None, *ROWS) else self
        wide = replace(self, dtype=dtype) if dtype in ROWS and dtype is not None else wide
        out: Tensor = implementation("packed_codes.dense", self.panels.device, backend)(wide)
        return out if dtype is None else out.to(dtype)

    def matmul(
        self,
        x: Float[Tensor, "n i"],
        *,
        onto: Float[Tensor, "n o"] | None = None,
        out: Float[Tensor, "n o"] | None = None,
        backend: str | None = None,
    ) -> Float[Tensor, "n o"]:
        """Return ``onto + W x``, bit for bit as `PackedWeight.matmul` of ``PackedWeight.pack(self.dense())``.

        Raises ShapeError.
        """
        check_product(self.shape, x, onto, out)
        if out is None:
            out = x.new_empty(x.shape[0], self.shape[0], dtype=x.dtype if onto is None else onto.dtype)
        implementation("packed_codes.matmul", x.device, backend)(self, x, onto, out)
        return out


def fits_4bit(absmax: Tensor, layout: FourBitLayout, dtype: torch.dtype) -> bool:
    """Return True if `PackedCodes.pack_4bit` accepts a matrix."""
    whole = len(layout.shape) == 2 and layout.shape[1] % GROUP == 0 and layout.numel > 0
    return whole and dtype in ROWS and _ordinary(absmax)


def fits_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> bool:
    """Return True if `PackedCodes.pack_int8` accepts a matrix."""
    return codes.ndim == 2 and codes.numel() > 0 and dtype in ROWS and _ordinary(absmax)


def fits_groups(groups: CodeGroups, dtype: torch.dtype) -> bool:
    """Return True if `PackedCodes.pack_groups` accepts a matrix."""
    i, n = groups.codes.shape[1], groups.scales.shape[1]
    whole = i % GROUP == 0 or BITS[groups.numbers] == 8
    even = n == 1 or (i % n == 0 and i // n % GROUP == 0)
    fits = groups.codes.numel() > 0 and dtype in ROWS and whole and even and all(map(_ordinary, groups.heads()))
    return fits and groups.halves_fit


def _of_groups(groups: CodeGroups, dtype: torch.dtype) -> PackedCodes:
    """Return the packed matrix that describes ``groups``, with its panels still to be filled."""
    o, i = groups.codes.shape
    nothing = groups.codes.new_empty(0)
    return PackedCodes(
        nothing, (o, i), groups.numbers, groups.unit, dtype, groups.scales.dtype, groups.formula, groups.rounding
    )


def _ordinary(absmax: Tensor) -> bool:
    size = absmax.abs()
    return bool((((size >= SMALLEST) & (size <= LARGEST)) | (size == 0)).all())


def padded_outputs(o: int) -> int:
    """Return the number of rows of a packed matrix of o outputs: o, rounded up to a multiple of `BLOCK`."""
    return o + -o % BLOCK
