"""Packed codes by csrc/packed."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.code_groups import NUMBERS
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.cpu.packed import multiply
from veneer.ops.memory import address
from veneer.ops.packed_codes import PackedCodes, padded_outputs
from veneer.ops.reference import packed_codes as reference


def pack_4bit(made: PackedCodes, packed: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return _packed(made, packed, absmax, block_size)


def pack_int8(made: PackedCodes, codes: Tensor, absmax: Tensor) -> Tensor:
    return _packed(made, codes, absmax, 0)


def codes(weight: PackedCodes) -> Tensor:
    if weight.coding in NUMBERS:  # once a matrix, when it is unpacked
        return reference.codes(weight)
    o, i = weight.shape
    out = (
        torch.empty((o, i), dtype=torch.int8) if weight.coding == "int8" else torch.empty(o * i // 2, dtype=torch.uint8)
    )
    kernels().packed_unpack_codes(*_numbers(weight, weight.panels), address(out))
    return out


def dense(weight: PackedCodes) -> Tensor:
    rows = torch.empty(weight.shape, dtype=weight.dtype)
    kernels().packed_dequantize(DTYPES[weight.dtype], *_numbers(weight, weight.panels), address(rows))
    return rows


def matmul(weight: PackedCodes, x: Tensor, onto: Tensor | None, out: Tensor) -> None:
    multiply((DTYPES[weight.dtype], *_numbers(weight, weight.panels)), x, onto, out)


def _packed(made: PackedCodes, given: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    panels = torch.empty(padded_outputs(made.shape[0]) * made.output_bytes, dtype=torch.uint8)
    kernels().packed_pack_codes(*_numbers(made, panels), address(given), address(absmax), block_size)
    return panels


def _numbers(weight: PackedCodes, panels: Tensor) -> tuple[int, ...]:
    return *weight.shape, weight.depth, address(panels), weight.coding_number, weight.unit
