"""compressed-tensors' integers: ``pack-quantized`` (several in a word of 32 bits) and ``int-quantized`` (a byte each).

Codes are signed. Packed ones are stored with ``2 ** (bits - 1)`` added, and so are their zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.ops.bits import n_bytes, pack, unpack
from veneer.quant.grouped import GroupedSpec, group_problems, order_of, ordered_codes
from veneer.quant.spec import Parts, part_problems, scale_problems, unreadable

BITS = (2, 4, 8)
WORD = 4  # bytes
NO_GROUP = -1
"""Value of ``weight_g_idx`` if groups are neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackQuantizedSpec(GroupedSpec):
    """Specification of a matrix of integers in compressed-tensors' formats. ``packed``: a word holds several codes."""

    packed: bool = True

    def owns(self, key: str) -> bool:
        return key in ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        codes, zeros, order = parts["weight"], parts.get("zeros"), parts.get("order")
        disk = {"weight_scale": parts["scales"]}
        if order is not None:
            inverse = torch.argsort(order.long())
            codes = ordered_codes(codes, self.bits, inverse)
            disk["weight_g_idx"] = (inverse // self.group_width).to(torch.int32)
        if not self.packed:
            disk["weight"] = self._signed(unpack(codes, self.bits, self.shape[1]))
            return disk if zeros is None else disk | {"weight_zero_point": self._signed(zeros)}
        disk |= {"weight_packed": _words(codes), "weight_shape": torch.tensor(self.shape)}
        if zeros is not None:
            disk["weight_zero_point"] = _words(pack(zeros.T.contiguous(), self.bits)).T.contiguous()
        return disk

    def from_disk(self, tensors: Parts) -> tuple[PackQuantizedSpec, dict[str, Tensor]]:
        problems = self._problems(tensors)
        if problems:
            raise unreadable(f"compressed-tensors with {self.bits} bits", self.shape, problems)
        zeros = tensors.get("weight_zero_point")
        scales = tensors["weight_scale"].reshape(-1, self.n_groups).expand(self.shape[0], -1).contiguous()
        parts = {"weight": self._codes(tensors), "scales": scales}
        if self.zeros is not None and zeros is not None:
            parts["zeros"] = self._zeros(zeros)
        g_idx = tensors.get("weight_g_idx")
        order = None
        if g_idx is not None and not bool((g_idx == NO_GROUP).all()):
            order, wrong = order_of(g_idx, self.group_width, self.n_groups)
            if wrong:
                raise unreadable(f"compressed-tensors with {self.bits} bits", self.shape, wrong)
        if order is not None:
            parts |= {"weight": ordered_codes(parts["weight"], self.bits, order), "order": order}
        return replace(self, scale_dtype=scales.dtype, ordered=order is not None), parts

    def _codes(self, tensors: Parts) -> Tensor:
        if not self.packed:
            return pack(self._unsigned(tensors["weight"]), self.bits)
        held = tensors["weight_packed"].contiguous().view(torch.uint8)
        return held[:, : n_bytes(self.shape[1], self.bits)].contiguous()

    def _zeros(self, stored: Tensor) -> Tensor:
        if not self.packed:
            return self._unsigned(stored.reshape(-1, self.n_groups).expand(self.shape[0], -1))
        return unpack(stored.T.contiguous().view(torch.uint8), self.bits, self.shape[0]).T.contiguous()

    def _problems(self, tensors: Parts) -> list[str]:
        (o, i), groups = self.shape, self.n_groups
        problems = group_problems(self)
        if problems:
            return problems
        words = -(-n_bytes(i, self.bits) // WORD)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        layout |= {"weight_packed": (torch.int32, (o, words))} if self.packed else {"weight": (torch.int8, self.shape)}
        if self.zeros is not None:
            packed = (torch.int32, (-(-n_bytes(o, self.bits) // WORD), groups))
            layout["weight_zero_point"] = packed if self.packed else (torch.int8, (o, groups))
        if "weight_g_idx" in tensors:
            layout["weight_g_idx"] = (torch.int32, (i,))
        problems = part_problems(tensors, layout)
        said = tensors.get("weight_shape")
        if said is not None and tuple(said.tolist()) != self.shape:
            problems.append(f"weight_shape says {tuple(said.tolist())}")
        scales = tensors.get("weight_scale")
        if scales is None or scales.numel() not in {o * groups, groups}:
            found = "missing" if scales is None else str(tuple(scales.shape))
            return [*problems, f"weight_scale is {found}, it should be {(o, groups)}"]
        return problems + scale_problems("weight_scale", scales)

    def _unsigned(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8)

    def _signed(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) - (1 << self.bits - 1)).to(torch.int8)


def _words(packed: Tensor) -> Tensor:
    filled = torch.nn.functional.pad(packed, (0, -packed.shape[1] % WORD))
    return filled.contiguous().view(torch.int32)
