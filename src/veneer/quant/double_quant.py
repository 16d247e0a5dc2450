"""Double quantization: the float32 ``absmax`` of 4-bit blocks, kept in 8 bits.

The mean is subtracted, and the rest is coded blockwise with the signed dynamic table, 256 values a block. 32/64 bits
a parameter become 8/64 + 32/(64 * 256).

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, QLoRA, arXiv:2305.14314, section 3.
Difference from the paper: a value is first rounded to an even grid of 65536 steps over [-1, 1], then to the nearest
table value.
bitsandbytes does so on the CPU, and the codes equal its codes. A code may differ by one from the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.blockwise import dequantize_blockwise, dynamic_map
from veneer.ops.four_bit_codes import NESTED

_GRID_STEPS = 65535


@dataclass(frozen=True, slots=True)
class CompressedAbsmax:
    """Absmax of n blocks: ``dynamic_map()[codes] * scale + offset``, scale by blocks of 256."""

    codes: UInt8[Tensor, " n"]
    scale: Float32[Tensor, " nested_blocks"]
    offset: Float32[Tensor, ""]

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.scale.numel() + 4


def compress_absmax(absmax: Float32[Tensor, " n"]) -> CompressedAbsmax:
    """Return absmax in 8 bits, 1 + 4/256 bytes a block. Raises ShapeError unless it is a nonempty float32 vector."""
    if absmax.dtype != torch.float32 or absmax.ndim != 1 or not len(absmax):
        raise ShapeError(f"absmax must be a vector of float32, got {absmax.dtype} {tuple(absmax.shape)}")
    offset = absmax.mean()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    scale = blocks.abs().amax(dim=1)
    scaled = blocks * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))[:, None]
    steps = ((scaled.clamp(-1, 1) + 1) * 0.5 * _GRID_STEPS + 0.5).int()
    codes = _codes_of_grid().to(absmax.device)[steps]
    # A block without spread: any code reads back as 0; bitsandbytes writes 0.
    codes = torch.where(scale[:, None] > 0, codes, torch.zeros_like(codes))
    return CompressedAbsmax(codes.reshape(-1)[: len(absmax)].contiguous(), scale, offset)


def expand_absmax(compressed: CompressedAbsmax, *, backend: str | None = None) -> Float32[Tensor, " n"]:
    """Return absmax in float32, up to its 8-bit rounding error. Raises ShapeError if sizes do not fit."""
    code = absmax_table(compressed.codes.device)
    return dequantize_blockwise(
        compressed.codes, compressed.scale, code, NESTED, offset=compressed.offset, backend=backend
    )


def absmax_table(device: torch.device) -> Float32[Tensor, "256"]:
    """Return the value of each of the 256 codes of absmax (before scale and offset), on a device."""
    return _table_on_gpu(device) if device.type == "cuda" else dynamic_map().to(device)


@cache
def _table_on_gpu(device: torch.device) -> Float32[Tensor, "256"]:
    """Return the table on a GPU. It is copied there only once, since every product with a double-quantized weight reads
    it.
    """
    return dynamic_map().to(device)


@cache
def _codes_of_grid() -> UInt8[Tensor, "65536"]:
    """Return, for each grid point ``-1 + 2 k / 65535``, the index of the nearest table value."""
    grid = -1.0 + torch.arange(_GRID_STEPS + 1, dtype=torch.float32) * (2.0 / _GRID_STEPS)
    code = dynamic_map().double()
    return torch.bucketize(grid.double(), (code[:-1] + code[1:]) / 2).to(torch.uint8)
