"""GPTQ's layout on disk: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, GPTQ, arXiv:2210.17323; the layout is AutoGPTQ's. Each column of
``qweight`` (words of 32 bits) holds the codes of an output one after the other, the lowest bits first. The convention
``gptq`` stores zeros less one, ``gptq_v2`` as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.ops.bits import pack, unpack
from veneer.quant.grouped import GroupedSpec, group_problems, order_of, ordered_codes, scales_problems
from veneer.quant.spec import Parts, part_problems, unreadable

BITS = (2, 3, 4, 8)
PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSpec(GroupedSpec):
    """Specification of a matrix stored by GPTQ. ``less_one``: zeros are stored minus one. ``symmetric``: every zero is
    the middle code.
    """

    less_one: bool = True
    symmetric: bool = False

    def owns(self, key: str) -> bool:
        return key in PARTS

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        codes, zeros, order = parts["weight"], parts["zeros"], parts.get("order")
        g_idx = torch.arange(self.shape[1], dtype=torch.int32, device=codes.device) // self.group_width
        if order is not None:
            inverse = torch.argsort(order.long())
            codes, g_idx = ordered_codes(codes, self.bits, inverse), g_idx[inverse]
        return {
            "qweight": codes.view(torch.int32).T.contiguous(),
            "qzeros": pack((zeros - int(self.less_one) & self._top).T.contiguous(), self.bits).view(torch.int32),
            "scales": parts["scales"].T.contiguous(),
            "g_idx": g_idx,
        }

    def from_disk(self, tensors: Parts) -> tuple[GptqSpec, dict[str, Tensor]]:
        problems = self._problems(tensors)
        if problems:
            raise unreadable(f"GPTQ with {self.bits} bits", self.shape, problems)
        codes = tensors["qweight"].T.contiguous().view(torch.uint8)
        zeros, wrong = self._zeros(tensors["qzeros"])
        order, found = order_of(tensors["g_idx"], self.group_width, self.n_groups) if "g_idx" in tensors else (None, [])
        if wrong + found:
            raise unreadable(f"GPTQ with {self.bits} bits", self.shape, wrong + found)
        parts = {"weight": codes, "scales": tensors["scales"].T.contiguous(), "zeros": zeros}
        if order is not None:
            parts |= {"weight": ordered_codes(codes, self.bits, order), "order": order}
        return replace(self, scale_dtype=tensors["scales"].dtype, ordered=order is not None), parts

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _problems(self, tensors: Parts) -> list[str]:
        (o, i), bits, groups = self.shape, self.bits, self.n_groups
        problems = group_problems(self)
        for n, what in ((i, "inputs"), (o, "outputs")):
            problems += [f"{n} {what} do not fill words of 32 bits"] if n * bits % 32 else []
        if problems:
            return problems
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "qweight": (torch.int32, (i * bits // 32, o)),
            "qzeros": (torch.int32, (groups, o * bits // 32)),
        }
        layout |= {"g_idx": (torch.int32, (i,))} if "g_idx" in tensors else {}
        problems = part_problems(tensors, layout)
        return problems + scales_problems(tensors, (groups, o))

    def _zeros(self, stored: Tensor) -> tuple[Tensor, list[str]]:
        """Return the zeros (o, groups), and messages about what is wrong with them.

        If zeros are stored minus one, the largest stored value means one more than the largest code, which wraps to 0
        as in AutoGPTQ's kernels. If most zeros are such, or if all zeros of a symmetric weight are off by one from the
        middle code, a message says that the file may follow the other convention.
        """
        zeros = unpack(stored.contiguous().view(torch.uint8), self.bits, self.shape[0])
        middle, named = 1 << self.bits - 1, "gptq" if self.less_one else "gptq_v2"
        other = "gptq_v2" if self.less_one else "gptq"
        advice = f"checkpoint_format says {named}: it may be {other}"
        n_above = int((zeros == self._top).sum()) if self.less_one else 0
        if 2 * n_above > zeros.numel():
            return zeros, [f"qzeros holds {n_above} zeros above the largest code, of {zeros.numel()}; {advice}"]
        if self.symmetric and bool((zeros == (middle if self.less_one else middle - 1)).all()):
            return zeros, [
                f"all of qzeros are {int(zeros[0, 0])}, one beside the middle of a symmetric weight; {advice}"
            ]
        return (zeros + int(self.less_one) & self._top).T.contiguous(), []
