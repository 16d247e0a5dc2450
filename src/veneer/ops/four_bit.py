"""Four-bit blockwise codes, NF4 and FP4: quantize, dequantize, and products with a quantized matrix.

The values of a weight are flattened row by row and cut into blocks. Each block keeps its largest magnitude ``absmax``
in float32, and each value the index of the table entry nearest to ``value / absmax``. Two indices share a byte, the
first value in the high nibble. Double quantization keeps ``absmax`` itself in 8 bits.

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, QLoRA, arXiv:2305.14314, section 3. Codes, absmax and
values equal those of bitsandbytes on the CPU, for every shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.four_bit_codes import NESTED, QUANT_TYPES
from veneer.ops.product import recorded_product, visible

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class FourBitLayout:
    """Layout of a weight in its packed bytes: all that dequantizing needs besides the bytes and ``absmax``.

    shape: of the weight. dtype: of the weight before it was quantized, and of the result of `dequantize_4bit`.
    """

    shape: tuple[int, ...]
    quant_type: str = "nf4"
    block_size: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        problems = []
        if self.quant_type not in QUANT_TYPES:
            problems.append(f"quant_type is {self.quant_type!r}; allowed: {list(QUANT_TYPES)}")
        if self.block_size not in BLOCK_SIZES:
            problems.append(f"block_size is {self.block_size!r}; allowed: {list(BLOCK_SIZES)}")
        if self.dtype not in FLOATS:
            problems.append(f"dtype is {self.dtype}; allowed: {[str(d) for d in FLOATS]}")
        if problems:
            raise ConfigError("4-bit layout: " + "; ".join(problems))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the packed codes: two values a byte, the last one padded."""
        return -(-self.numel // 2)

    @property
    def n_blocks(self) -> int:
        return -(-self.numel // self.block_size)


def quantize_4bit(
    w: Float[Tensor, "..."], quant_type: str, block_size: int = 64, *, backend: str | None = None
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    """Return the packed codes ``(ceil(n/2),)`` and the absmax of each block ``(ceil(n/block_size),)`` of w's n values.

    w: any shape, float32, bfloat16 or float16. Raises ConfigError (unknown type or block size), ShapeError (dtype),
    NonFiniteError (NaN or infinity in w).
    """
    if w.dtype not in FLOATS:
        raise ShapeError(f"quantize_4bit takes {[str(d) for d in FLOATS]}, got {w.dtype}")
    layout = FourBitLayout(tuple(w.shape), quant_type, block_size, w.dtype)
    flat = w.detach().reshape(-1).contiguous()
    packed, absmax = implementation("four_bit.quantize_4bit", w.device, backend)(flat, layout)
    if not bool(torch.isfinite(absmax).all()):
        _raise_non_finite(w)
    return packed, absmax


def dequantize_4bit(
    packed: UInt8[Tensor, "..."],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """Return the weight in its shape: ``table[code] * absmax`` in float32, rounded once to dtype, or to layout.dtype if
    it is None.

    packed: any shape that holds layout.n_bytes bytes. Raises ShapeError if sizes or dtypes do not fit the layout.
    """
    _check_packed(packed, absmax, layout)
    dtype = _float(dtype or layout.dtype)
    run = implementation("four_bit.dequantize_4bit", packed.device, backend)
    out: Tensor = run(packed.reshape(-1), absmax, layout, dtype)
    return out.view(layout.shape)


def dequantize_nested_4bit(
    packed: UInt8[Tensor, "..."],
    nested: tuple[UInt8[Tensor, " blocks"], Float32[Tensor, " nested_blocks"], Float32[Tensor, ""]],
    code: Float32[Tensor, "256"],
    layout: FourBitLayout,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """Return the result of `dequantize_4bit`, bit for bit, from an absmax in 8 bits: ``code[codes] * scale + offset``
    in float32.

    ``nested``: the 8-bit codes, the scale of each `NESTED` of them, and the offset. Raises ShapeError as
    `dequantize_4bit` does, and if there are not as many codes and scales as the layout has blocks.
    """
    codes, scale, _ = nested
    if codes.shape != (layout.n_blocks,) or scale.shape != (-(-layout.n_blocks // NESTED),):
        raise ShapeError(
            f"a 4-bit weight of shape {layout.shape} has {layout.n_blocks} blocks, and a scale for each {NESTED}; "
            f"given {tuple(codes.shape)} codes of absmax and {tuple(scale.shape)} scales"
        )
    run = implementation("four_bit.dequantize_nested_4bit", packed.device, backend)
    out: Tensor = run(packed.reshape(-1), nested, code, layout, _float(dtype or layout.dtype))
    return out.view(layout.shape)


def matmul_4bit(
    x: Float[Tensor, "*batch i"],
    packed: UInt8[Tensor, "..."],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch o"]:
    """Return ``W x`` on the last axis in x's dtype, for a quantized ``W (o, i)``; differentiable in x.

    Sums are float32 (or torch's own accumulation of a product in x's dtype). Raises ShapeError.
    """
    _check_product(x, packed, absmax, layout, layout.shape[-1])
    return _product(x, packed, absmax, layout, (False, backend))


def matmul_t_4bit(
    dy: Float[Tensor, "*batch o"],
    packed: UInt8[Tensor, "..."],
    absmax: Float32[Tensor, " blocks"],
    layout: FourBitLayout,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch i"]:
    """Return ``Wᵀ dy`` on the last axis in dy's dtype: the gradient of `matmul_4bit` in x; differentiable in dy."""
    _check_product(dy, packed, absmax, layout, layout.shape[0])
    return _product(dy, packed, absmax, layout, (True, backend))


def _product(x: Tensor, packed: Tensor, absmax: Tensor, layout: FourBitLayout, how: tuple[bool, str | None]) -> Tensor:
    transposed, backend = how

    def multiply(x: Tensor, transposed: bool) -> Tensor:
        form = (layout.shape, layout.quant_type, layout.block_size)
        return product_4bit(x, packed, absmax, *form, transposed, backend)

    if not (x.requires_grad and torch.is_grad_enabled()):  # recording takes as long as the product of a row
        return multiply(x, transposed)
    return recorded_product(x, multiply, transposed)


@visible(
    "product_4bit(Tensor x, Tensor packed, Tensor absmax, int[] shape, str quant_type, int block_size, "
    "bool transposed, str? backend) -> Tensor"
)
def product_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    transposed: bool,
    backend: str | None,
) -> Tensor:
    """Return ``W x`` or ``Wᵀ x`` on the last axis, for checked arguments and without autograd."""
    run = implementation("four_bit.matmul_t_4bit" if transposed else "four_bit.matmul_4bit", x.device, backend)
    layout = FourBitLayout(tuple(shape), quant_type, block_size)
    out: Tensor = run(x.reshape(-1, x.shape[-1]).contiguous(), packed.reshape(-1), absmax, layout)
    return out.view(*x.shape[:-1], out.shape[-1])


def _float(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATS:
        raise ShapeError(f"4-bit ops give {[str(d) for d in FLOATS]}, got dtype {dtype}")
    return dtype


def _check_packed(packed: Tensor, absmax: Tensor, layout: FourBitLayout) -> None:
    problems = []
    if packed.dtype != torch.uint8 or packed.numel() != layout.n_bytes:
        problems.append(f"packed is {packed.dtype} with {packed.numel()} elements, not uint8 with {layout.n_bytes}")
    if absmax.dtype != torch.float32 or tuple(absmax.shape) != (layout.n_blocks,):
        problems.append(f"absmax is {absmax.dtype} {tuple(absmax.shape)}, not float32 {(layout.n_blocks,)}")
    if not (packed.is_contiguous() and absmax.is_contiguous()):
        problems.append("packed and absmax must be contiguous; call .contiguous()")
    if problems:
        raise ShapeError(f"4-bit weight of shape {layout.shape}, blocks of {layout.block_size}: " + "; ".join(problems))


def _check_product(x: Tensor, packed: Tensor, absmax: Tensor, layout: FourBitLayout, width: int) -> None:
    _check_packed(packed, absmax, layout)
    if len(layout.shape) != 2:
        raise ShapeError(f"a product needs a matrix, this 4-bit weight has shape {layout.shape}: dequantize it first")
    if x.ndim < 1 or x.shape[-1] != width:
        raise ShapeError(f"the last axis of {tuple(x.shape)} must be {width} for a 4-bit weight {layout.shape}")
    _float(x.dtype)


def _raise_non_finite(w: Tensor) -> None:
    bad = (~torch.isfinite(w)).nonzero()
    where = tuple(bad[0].tolist())
    raise NonFiniteError(
        f"cannot quantize a weight of shape {tuple(w.shape)}: {len(bad)} of its values are NaN or infinite, the first "
        f"is {float(w[where])} at {where}. Save or fetch the weights again"
    )
