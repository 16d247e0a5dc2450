"""AWQ's layout on disk (``gemm``): ``qweight``, ``qzeros``, ``scales``.

Source: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, AWQ, arXiv:2306.00978; the layout is AutoAWQ's.
A row of ``qweight`` is an input. Words of 32 bits hold eight outputs, the even ones below the odd ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from veneer.ops.bits import pack, unpack
from veneer.quant.grouped import GroupedSpec, group_problems, scales_problems
from veneer.quant.spec import Parts, part_problems, unreadable

PARTS = frozenset({"qweight", "qzeros", "scales"})
BITS = 4
PER_WORD = 8
STORED_AT = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of its eight outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqSpec(GroupedSpec):
    """Specification of a matrix stored by AWQ."""

    bits: int = BITS

    def owns(self, key: str) -> bool:
        return key in PARTS

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        codes = unpack(parts["weight"], BITS, self.shape[1])
        return {
            "qweight": _to_words(codes.T.contiguous()),
            "qzeros": _to_words(parts["zeros"].T.contiguous()),
            "scales": parts["scales"].T.contiguous(),
        }

    def from_disk(self, tensors: Parts) -> tuple[AwqSpec, dict[str, Tensor]]:
        problems = self._problems(tensors)
        if problems:
            raise unreadable("AWQ", self.shape, problems)
        parts = {
            "weight": pack(_from_words(tensors["qweight"]).T.contiguous(), BITS),
            "scales": tensors["scales"].T.contiguous(),
            "zeros": _from_words(tensors["qzeros"]).T.contiguous(),
        }
        return replace(self, scale_dtype=tensors["scales"].dtype), parts

    def _problems(self, tensors: Parts) -> list[str]:
        (o, i), groups = self.shape, self.n_groups
        problems = group_problems(self) + ([f"{o} outputs are not a multiple of 8"] if o % PER_WORD else [])
        if problems:
            return problems
        words = o // PER_WORD
        problems = part_problems(
            tensors, {"qweight": (torch.int32, (i, words)), "qzeros": (torch.int32, (groups, words))}
        )
        return problems + scales_problems(tensors, (groups, o))


def _from_words(words: Int32[Tensor, "n words"]) -> UInt8[Tensor, "n o"]:
    codes = unpack(words.contiguous().view(torch.uint8), BITS, words.shape[1] * PER_WORD)
    places = torch.tensor(STORED_AT, device=words.device)
    return codes.view(len(words), -1, PER_WORD).index_select(2, places).view(len(words), -1)


def _to_words(codes: UInt8[Tensor, "n o"]) -> Int32[Tensor, "n words"]:
    outputs = torch.tensor(STORED_AT, device=codes.device).argsort()
    placed = codes.view(len(codes), -1, PER_WORD).index_select(2, outputs)
    return pack(placed.view(len(codes), -1), BITS).view(torch.int32)
