"""Matrix as small numbers with a scale for each group of inputs: the common form of formats whose codes are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from veneer.ops.scaled import powers

NUMBERS = (
    "signed4",
    "unsigned4",
    "iq4",
    "e2m1",
    "signed8",
    "unsigned8",
    "e4m3",
    "e5m2",
    "signed2",
    "unsigned2",
    "signed3",
    "unsigned3",
)
"""As csrc/core/panel_layout.h counts them: ``code - 8``, ``code``, ggml's table, a 4-bit float, a byte with and without
a sign, 8-bit floats; ``code - 2`` and ``code`` of 2 bits, ``code - 4`` and ``code`` of 3 bits."""
BITS = dict.fromkeys(NUMBERS, 8) | {"signed4": 4, "unsigned4": 4, "iq4": 4, "e2m1": 4}
BITS |= {"signed2": 2, "unsigned2": 2, "signed3": 3, "unsigned3": 3}
"""Bits of a code."""
MIDDLES = {"signed2": 2, "signed3": 4, "signed4": 8}
"""Codes of zero, where it is not 0."""
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
"""Dtypes of scales, as csrc/core/panel_layout.h counts them; a byte is E8M0's power of two."""
FORMULAS = ("scaled", "added", "less_zero", "apart")
"""As csrc/core/panel_layout.h counts them."""
UNIT = 16
"""Inputs whose codes are neighbours: a group is a multiple of it."""
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class CodeGroups:
    """Matrix (o, i) in ``codes``, one a byte, with ``scales (o, groups)`` of equally wide groups of inputs.

    ``numbers`` names the type of the number that a code stands for. Values are rounded to ``rounding``. ``formula`` is
    one of:

    - "scaled": ``number * scale``;
    - "added": ``number * scale + beside``, where the product is exact in float32;
    - "less_zero": ``(number - beside) * scale``, of whole numbers and scales of 16 bits;
    - "apart": as "less_zero", and the difference is rounded too.

    ``beside`` is the second number of each group, in the shape and dtype of the scales; None for "scaled". A group is a
    multiple of 16 inputs, or a row.
    """

    codes: UInt8[Tensor, "o i"]
    numbers: str
    scales: Tensor
    beside: Tensor | None = None
    formula: str = "scaled"
    rounding: torch.dtype = torch.float32

    @property
    def unit(self) -> int:
        """Number of inputs in a group. If a row is one group: the row's length, rounded up to a multiple of 16."""
        i, groups = self.codes.shape[1], self.scales.shape[1]
        return i // groups if groups > 1 else i + -i % UNIT

    @property
    def halves_fit(self) -> bool:
        """Return True if the kernels round to float16 exactly as the format does, or if nothing is rounded to float16.

        They do so if numbers are whole, scales are float16, and no product is infinite; subnormal products are then
        exact. Tables of values (e2m1, iq4), other scales and the formula "added" do not fit. 8-bit floats always fit.
        """
        if self.rounding != torch.float16 or self.numbers in ("e4m3", "e5m2"):
            return True
        whole = self.numbers.startswith(("signed", "unsigned"))
        if not whole or self.scales.dtype != torch.float16 or self.formula == "added":
            return False
        reach = torch.tensor(float(1 << BITS[self.numbers]))
        if self.beside is not None:
            reach = reach + self.beside.float().abs()
        sizes = reach * self.scales.float().abs()
        return bool((reach <= _LARGEST_HALF).all() and (self.formula == "apart" or (sizes <= _LARGEST_HALF).all()))

    def heads(self) -> list[Float32[Tensor, "o groups"]]:
        """Return ``scales``, and ``beside`` if it is given, in float32."""
        return [powers(self.scales)] if self.beside is None else [powers(self.scales), self.beside.float()]


def even_groups(scales: Tensor, i: int, group: int) -> Tensor | None:
    """Return scales for equal groups, each a multiple of 16 inputs or a row; None if no such groups divide the row.

    ``scales`` is (o, ceil(i / group)), and the last of its groups may be shorter.
    """
    if scales.shape[1] == 1:
        return scales
    even = math.gcd(i, group)
    return None if even % UNIT else scales.repeat_interleave(group // even, dim=1)[:, : i // even]
