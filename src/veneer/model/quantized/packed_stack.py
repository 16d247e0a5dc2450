"""Quantized weights of a layer's experts, packed for the serving kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from veneer.model.quantized.packed_linear import PANEL, joined, kind_of, parts_of
from veneer.model.quantized.stack import CodedStack, PackedExpertStack
from veneer.ops.experts import PackedStack
from veneer.ops.packed_codes import PackedCodes
from veneer.quant.ggml import GgmlWeight
from veneer.quant.packing import packed_codes, unpacked_codes
from veneer.quant.product import CodedWeight
from veneer.quant.stack import JoinedWeight, numbered
from veneer.records.frozen import FrozenWeight


class PackedCodedStack(PackedExpertStack):
    """Packed codes that replace a quantized stack, whose codes are freed.

    Blocks of ggml's formats are not freed, because they hold the scales too, and are usually pages of a mapped file.
    """

    def __init__(self, coded: CodedStack, packed: PackedStack) -> None:
        super().__init__(packed)
        self._stands_for = (coded,)  # in a tuple, for it is no part of the model meanwhile
        for k, piece in enumerate(_pieces(coded.coded().expert(0))):
            if not isinstance(piece, GgmlWeight):
                name = numbered("weight", k)
                coded._buffers[name] = torch.empty_like(cast(Tensor, coded._buffers[name]), device="meta")

    def put_back(self, experts: nn.Module, name: str) -> None:
        [coded] = self._stands_for
        each = [self._codes(coded, number) for number in range(self.packed_stack.n_experts)]
        for k, codes in enumerate(zip(*each, strict=True)):
            own = numbered("weight", k)
            like = cast(Tensor, coded._buffers[own])
            if like.is_meta:
                coded._buffers[own] = torch.stack(cast("list[Tensor]", list(codes))).view(like.dtype).view(like.shape)
        experts._modules[name] = coded

    def _codes(self, coded: CodedStack, number: int) -> list[Tensor | None]:
        """Return the codes of one expert's matrices, unpacked into the format's layout. An item is None if the format
        keeps codes and scales in one tensor.
        """
        pieces = list(_pieces(coded.coded().expert(number)))
        heights = [piece.shape[0] for piece in coded.stack_spec.pieces]
        packed = parts_of(self.packed_stack.expert(number), heights)
        each = zip(pieces, packed, strict=True)
        return [unpacked_codes(piece, cast(PackedCodes, own)) for piece, own in each]


def packed_coded(coded: CodedStack, dtype: torch.dtype) -> PackedStack | None:
    """Pack the codes of all experts for rows of ``dtype``. Return None if an expert's matrix cannot be packed, or if
    the packed experts differ in kind.

    Gate and up that are quantized separately are joined, which needs a number of rows of each that fills whole panels.
    """
    stack, each = coded.coded(), list[PackedCodes]()
    for number in range(stack.shape[0]):
        expert = _packed_expert(stack.expert(number), dtype)
        if expert is None:
            return None
        each.append(expert)
    return PackedStack.of(each) if len({kind_of(expert) for expert in each}) == 1 else None


def _packed_expert(weight: FrozenWeight, dtype: torch.dtype) -> PackedCodes | None:
    found = list[PackedCodes]()
    for piece in _pieces(weight):
        fits = isinstance(piece, CodedWeight) and piece.compute_dtype in (None, dtype)
        packed = packed_codes(piece, dtype) if fits else None
        if packed is None:
            return None
        found.append(packed)
    fills = len(found) == 1 or all(packed.shape[0] % PANEL == 0 for packed in found)
    return cast(PackedCodes, joined(found)) if fills and len({kind_of(packed) for packed in found}) == 1 else None


def _pieces(weight: FrozenWeight) -> Iterator[CodedWeight]:
    """Yield the quantized matrices whose rows follow one another in an expert's weight."""
    yield from cast("tuple[CodedWeight, ...]", weight.pieces if isinstance(weight, JoinedWeight) else (weight,))
