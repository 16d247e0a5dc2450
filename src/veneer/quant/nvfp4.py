"""NVFP4: blocks of 16 inputs in E2M1, a scale in E4M3 for each, and one number in float32 for the matrix.

compressed-tensors divides by that number (``weight_global_scale``), ModelOpt multiplies by it (``weight_scale_2``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.bits import pack
from veneer.quant.fp4_blocks import LARGEST, Fp4BlockWeight, encoded, stored_blocks
from veneer.quant.spec import Parts, not_finite, scale_problems, unreadable

BLOCK = 16
SCALE = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Nvfp4Spec:
    """Specification of a matrix in NVFP4.

    ``divides``: values are divided by the matrix's float32 scale, and tensors are named as in the library
    compressed-tensors. If False, values are multiplied by it, and names are ModelOpt's. ``overall`` is that scale as
    read from a file; None for a matrix that was not read from one.
    """

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    divides: bool = True
    compute_dtype: torch.dtype | None = None
    overall: float | None = None

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        o, i = self.shape
        size = (1,) if self.divides else ()
        return {
            "weight": (torch.uint8, (o, i // 2)), "scale": (SCALE, (o, i // BLOCK)), "overall": (torch.float32, size),
        }  # fmt: skip

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return codes and scales. The largest value of the matrix gets the largest scale and the largest code.

        A stored matrix keeps its float32 scale if its values fit: other programs expect one such scale for q, k and v,
        or for gate and up. Raises ShapeError, NonFiniteError.
        """
        if self.shape[1] % BLOCK:
            raise ShapeError(
                f"a weight of {self.shape[1]} inputs cannot be quantized to NVFP4: their number must be a multiple of "
                f"{BLOCK}. Merge into 16-bit weights instead"
            )
        blocks = weight.float().view(self.shape[0], -1, BLOCK)
        absmax = blocks.abs().amax(dim=-1)
        if not bool(absmax.isfinite().all()):
            raise not_finite(self.shape)
        largest, smallest = torch.finfo(SCALE).max, torch.finfo(SCALE).smallest_normal
        held = self._number(absmax.max().detach())
        overall = held if self.divides else 1.0 / held
        scale = (absmax / LARGEST * overall).clamp(smallest, largest).to(SCALE)
        codes = encoded(blocks / (scale.float() / overall)[:, :, None]).view(self.shape)
        return {"weight": pack(codes, 4), "scale": scale, "overall": held.view(1) if self.divides else held}

    def bind(self, parts: Parts) -> Fp4BlockWeight:
        overall = parts["overall"].view(())
        return Fp4BlockWeight(parts["weight"], parts["scale"], overall, self.divides, self.dtype, self.compute_dtype)

    def owns(self, key: str) -> bool:
        return key in (self._packed, "weight_scale", self._overall)

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        return {self._packed: parts["weight"], "weight_scale": parts["scale"], self._overall: parts["overall"]}

    def from_disk(self, tensors: Parts) -> tuple[Nvfp4Spec, dict[str, Tensor]]:
        parts, problems = stored_blocks(tensors, self.shape, BLOCK, (SCALE,), self._packed)
        overall = tensors.get(self._overall)
        if overall is None or overall.numel() != 1:
            problems.append(f"{self._overall} is {'missing' if overall is None else tuple(overall.shape)}")
        else:
            problems += scale_problems(self._overall, overall, (torch.float32,))
        if problems or overall is None:
            raise unreadable("NVFP4", self.shape, problems)
        parts["overall"] = overall.reshape(self.part_layout()["overall"][1])
        return replace(self, overall=float(overall)), parts

    def _number(self, peak: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the float32 scale to store for a matrix whose largest magnitude is ``peak``."""
        largest = torch.finfo(SCALE).max
        if self.overall is not None:
            divisor = self.overall if self.divides else 1.0 / self.overall
            # up to 1 above the largest code, values are as near to it as others are to theirs
            if float(peak) * divisor <= (LARGEST + 1) * largest:
                return torch.full_like(peak, self.overall)
        # its inverse is stored too, and is no number below the smallest
        most = 1.0 / torch.finfo(torch.float32).smallest_normal
        overall = torch.where(peak > 0, (LARGEST * largest / peak).clamp(max=most), torch.ones_like(peak))
        return overall if self.divides else 1.0 / overall

    @property
    def _packed(self) -> str:
        return "weight_packed" if self.divides else "weight"

    @property
    def _overall(self) -> str:
        return "weight_global_scale" if self.divides else "weight_scale_2"
