"""MXFP4 of all experts in one tensor, as gpt-oss stores them: ``…_blocks`` and ``…_scales``.

Source: OpenAI 2025, gpt-oss-120b & gpt-oss-20b, arXiv:2508.10925, section 2.1; layout of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.ops.scaled import powers
from veneer.quant.mxfp4 import BLOCK, Mxfp4Spec
from veneer.quant.spec import Parts, part_problems, scale_problems, unreadable
from veneer.quant.stack import StackSpec


@dataclass(frozen=True, slots=True)
class Mxfp4StackSpec(StackSpec):
    """Specification of experts in MXFP4 that are stacked on disk too, under the only name in ``names``.

    ``{name}_blocks (experts, o, i / 32, 16)`` holds two codes a byte, and ``{name}_scales (experts, o, i / 32)`` the
    scales' exponents.
    """

    @classmethod
    def of(cls, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Mxfp4StackSpec:
        """Return the specification of weights of this shape (experts, o, i)."""
        n_experts, o, i = shape
        return cls(n_experts, (Mxfp4Spec((o, i), dtype),), (name,))

    def owns(self, key: str) -> bool:
        return key in self._disk_names()

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        blocks, scales = self._disk_names()
        return {blocks: parts["weight"].view(*self._scales_shape(), BLOCK // 2), scales: parts["scale"]}

    def from_disk(self, tensors: Parts) -> tuple[Mxfp4StackSpec, dict[str, Tensor]]:
        (blocks, scales), size, (_, o, i) = self._disk_names(), self._scales_shape(), self.shape
        problems = [f"{i} inputs are not a multiple of {BLOCK}"] if i % BLOCK else []
        problems += part_problems(tensors, {blocks: (torch.uint8, (*size, BLOCK // 2)), scales: (torch.uint8, size)})
        if not problems:
            problems += scale_problems(scales, tensors[scales], (torch.uint8,), powers)
        if problems:
            raise unreadable("MXFP4", (o, i), problems, "the number of experts and the widths in config.json")
        return self, {
            "weight": tensors[blocks].reshape(self.n_experts, o, i // 2).contiguous(),
            "scale": tensors[scales].contiguous(),
        }

    def _disk_names(self) -> tuple[str, str]:
        return f"{self.names[0]}_blocks", f"{self.names[0]}_scales"

    def _scales_shape(self) -> tuple[int, int, int]:
        n_experts, o, i = self.shape
        return n_experts, o, i // BLOCK
