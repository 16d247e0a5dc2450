"""Matrices of small numbers with scales: ``(number(code) - zero) * scale``, decoded, and multiplied by a few rows.

Codes of 1 to 8 bits are packed row by row, the lowest bits first. A scale, and a zero if there is one, holds for
``group`` inputs of ``height`` outputs. Difference and product are rounded to ``rounding``, as the format's own library
computes them. Sources: OCP Microscaling Formats v1.0 (2023) for E2M1 and E8M0; OCP 8-bit Floating Point Specification
(2023) for E4M3 and E5M2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.bits import n_bytes
from veneer.ops.dispatch import backends, implementation
from veneer.ops.rows import listed_rows

CODINGS = ("whole", "e2m1", "e4m3", "e5m2")
"""As csrc/coded/coded.h counts them."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.uint8)
"""Dtypes of scales; a byte is E8M0's power of two."""
ZEROS = (*FLOATS, torch.uint8)
_BITS = {"e2m1": (4,), "e4m3": (8,), "e5m2": (8,), "whole": (1, 2, 3, 4, 5, 6, 8)}


@dataclass(frozen=True, slots=True, eq=False)
class ScaledCodes:
    """Matrix ``(o, columns)`` as packed ``codes (o, bytes)``, which are uint8.

    ``scales`` and ``zeros`` hold ``ceil(o / height) * ceil(columns / group)`` values, in any shape. If ``zeros`` is
    None, ``2 ** (bits - 1)`` is subtracted from whole numbers, and nothing from floats. ``overall`` multiplies all
    scales, or divides them if ``divides``. Raises ShapeError if the tensors do not fit.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    group: int
    coding: str = "whole"
    bits: int = 8
    height: int = 1
    zeros: Tensor | None = None
    overall: Float32[Tensor, ""] | None = None
    divides: bool = False
    rounding: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ShapeError(f"codes {tuple(self.codes.shape)} of {self.columns} columns: {'; '.join(problems)}")

    @property
    def groups(self) -> int:
        """Number of groups of columns, each with a scale, in a row."""
        return -(-self.columns // self.group)

    def _problems(self) -> list[str]:
        codes, found = self.codes, []
        if self.bits not in _BITS.get(self.coding, ()):
            found.append(f"{self.coding!r} of {self.bits} bits is none of {_BITS}")
        elif codes.ndim != 2 or codes.itemsize != 1 or codes.shape[1] != n_bytes(self.columns, self.bits):
            found.append(f"rows of {self.bits} bits take {n_bytes(self.columns, self.bits)} bytes")
        held = [t for t in (codes, self.scales, self.zeros) if t is not None]
        if not all(tensor.is_contiguous() for tensor in held):
            found.append("codes, scales and zeros must be contiguous; call .contiguous()")
        if self.rounding not in FLOATS:
            found.append(f"values are rounded to {FLOATS}, not to {self.rounding}")
        n_scales = -(-len(codes) // self.height) * self.groups
        for name, tensor, allowed in (("scales", self.scales, SCALES), ("zeros", self.zeros, ZEROS)):
            if tensor is not None and (tensor.dtype not in allowed or tensor.numel() != n_scales):
                found.append(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not {n_scales} of {allowed}")
        return found


def decode_scaled(
    w: ScaledCodes, index: slice | Int[Tensor, " k"], *, backend: str | None = None
) -> Float32[Tensor, "k columns"]:
    """Return the values of rows: of a slice without a step, or those listed.

    Raises IndexError for a row number out of range.
    """
    n = len(w.codes)
    index = slice(*index.indices(n)) if isinstance(index, slice) else listed_rows(index, n)
    n_rows = max(0, index.stop - index.start) if isinstance(index, slice) else len(index)
    if not n_rows * w.columns:
        return w.scales.new_empty(n_rows, w.columns, dtype=torch.float32)
    out: Tensor = implementation("scaled.decode", w.codes.device, backend)(w, index)
    return out


def matmul_scaled(x: Float[Tensor, "n i"], w: ScaledCodes, *, backend: str | None = None) -> Float[Tensor, "n o"]:
    """Return ``x Wᵀ`` in x's dtype, for a few rows: W is decoded anew for every 16. Sums and values are float32.

    Raises ShapeError.
    """
    if x.ndim != 2 or x.shape[1] != w.columns:
        raise ShapeError(f"x must be (n, {w.columns}) for rows of {w.columns} values; got {tuple(x.shape)}")
    if not math.prod((*x.shape, len(w.codes))):
        return x.new_zeros(len(x), len(w.codes))
    out: Tensor = implementation("scaled.matmul", x.device, backend)(x, w)
    return out


def has_product(x: Tensor) -> bool:
    """Return True if a kernel multiplies x. If not, `matmul_scaled` decodes all of W at once."""
    return x.device.type == "cpu" and x.dtype in FLOATS and "cpu" in backends("scaled.matmul")


def powers(scale: Tensor) -> Float[Tensor, "..."]:
    """Return scales in float32; a byte is the power of two of E8M0, ``2 ** (byte - 127)``, and 255 is NaN."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
