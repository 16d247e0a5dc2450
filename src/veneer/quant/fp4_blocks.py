"""Frozen weight in 4-bit floats (E2M1) with a scale for each block of inputs: MXFP4 and NVFP4.

Sources: OCP Microscaling Formats v1.0 (2023), sections 5.3.3 and 6.3 (blocks of 32, scales that are powers of two);
NVIDIA's NVFP4 (blocks of 16, scales in E4M3, and one float32 for the matrix). Difference: activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from veneer.ops.scaled import ScaledCodes, powers
from veneer.quant.blocks import ScaledWeight
from veneer.quant.spec import Parts, scale_problems

LARGEST = 6.0
_BOUNDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Middles between neighbouring values, and whether the middle itself is rounded up: to the even mantissa."""


@dataclass(frozen=True, slots=True)
class Fp4BlockWeight(ScaledWeight):
    """``W (o, i) = values[codes] * scale`` in float32, with a scale for each block of inputs.

    ``overall`` multiplies all scales, or divides them if ``divides``. If it is None, the scales are used as they are.
    """

    codes: UInt8[Tensor, "o bytes"]
    scales: Tensor
    overall: Float[Tensor, ""] | None = None
    divides: bool = False
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.overall)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def scaled(self) -> ScaledCodes:
        columns = self.shape[1]
        return ScaledCodes(
            self.codes, self.scales, columns, columns // self.scales.shape[1], "e2m1", 4,
            overall=self.overall, divides=self.divides,
        )  # fmt: skip


def encoded(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the codes of the nearest values, ties to even. A magnitude above the largest value of E2M1 gets the code
    of that value.
    """
    size = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound, up in _BOUNDS:
        codes += (size >= bound) if up else (size > bound)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def stored_blocks(
    tensors: Parts,
    shape: tuple[int, int],
    block: int,
    scale_dtypes: Collection[torch.dtype],
    packed: str = "weight_packed",
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the codes and scales of a weight on disk, and a message for each thing that is wrong with them."""
    (o, i), problems = shape, []
    if i % block:
        return {}, [f"{i} inputs are not a multiple of {block}"]
    wanted = {packed: ((torch.uint8,), (o, i // 2)), "weight_scale": (scale_dtypes, (o, i // block))}
    for name, (dtypes, size) in wanted.items():
        found = tensors.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif found.dtype not in dtypes or tuple(found.shape) != size:
            problems.append(f"{name} is {found.dtype} {tuple(found.shape)}, it should be {next(iter(dtypes))} {size}")
        elif name == "weight_scale":
            problems += scale_problems(name, found, scale_dtypes, powers)
    parts = {} if problems else {"weight": tensors[packed], "scale": tensors["weight_scale"]}
    return {name: part.contiguous() for name, part in parts.items()}, problems
