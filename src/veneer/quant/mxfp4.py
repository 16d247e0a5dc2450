"""MXFP4: blocks of 32 inputs in E2M1 with a power of two as scale, as compressed-tensors stores linear layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.bits import pack
from veneer.ops.scaled import powers
from veneer.quant.fp4_blocks import Fp4BlockWeight, encoded, stored_blocks
from veneer.quant.spec import Parts, not_finite, unreadable

BLOCK = 32
LARGEST_EXPONENT = 2  # of E2M1: 6 is 1.5 * 2 ** 2
BIAS = 127
SCALES = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Mxfp4Spec:
    """Specification of a matrix in MXFP4. A width that is not a multiple of 32 is an error."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype = torch.uint8
    compute_dtype: torch.dtype | None = None

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        o, i = self.shape
        return {"weight": (torch.uint8, (o, i // 2)), "scale": (self.scale_dtype, (o, i // BLOCK))}

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return codes and scales as the specification computes them (section 6.3): from the exponent of a block's
        largest value.

        Raises ShapeError, NonFiniteError.
        """
        if self.shape[1] % BLOCK:
            raise ShapeError(
                f"a weight of {self.shape[1]} inputs cannot be quantized to MXFP4: their number must be a multiple of "
                f"{BLOCK}. Merge into 16-bit weights instead"
            )
        blocks = weight.float().view(self.shape[0], -1, BLOCK)
        absmax = blocks.abs().amax(dim=-1)
        if not bool(absmax.isfinite().all()):
            raise not_finite(self.shape)
        exponent = torch.frexp(absmax).exponent - 1 - LARGEST_EXPONENT
        scale = (torch.where(absmax > 0, exponent, torch.zeros_like(exponent)) + BIAS).clamp(0, 254).to(torch.uint8)
        codes = encoded(blocks / powers(scale)[:, :, None]).view(self.shape)
        return {"weight": pack(codes, 4), "scale": scale.view(self.scale_dtype)}

    def bind(self, parts: Parts) -> Fp4BlockWeight:
        return Fp4BlockWeight(parts["weight"], parts["scale"], dtype=self.dtype, compute_dtype=self.compute_dtype)

    def owns(self, key: str) -> bool:
        return key in ("weight_packed", "weight_scale")

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        return {"weight_packed": parts["weight"], "weight_scale": parts["scale"]}

    def from_disk(self, tensors: Parts) -> tuple[Mxfp4Spec, dict[str, Tensor]]:
        parts, problems = stored_blocks(tensors, self.shape, BLOCK, SCALES)
        if problems:
            raise unreadable("MXFP4", self.shape, problems)
        return replace(self, scale_dtype=parts["scale"].dtype), parts
