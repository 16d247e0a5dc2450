"""Frozen weight in 4 bits with blockwise scales, optionally with double quantization (NF4, FP4).

NF4 and FP4 differ only in the table of codes. Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, QLoRA,
arXiv:2305.14314, section 3. The scales ("absmax", one per block of 64) are centred and quantized to 8 bits in blocks of
256. This takes 4 + 8/64 + 32/(64·256) = 4.127 bits per parameter. On disk the tensors are those of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.errors import ConfigError, FormatError
from veneer.ops.blockwise import dynamic_map
from veneer.ops.four_bit import (
    FourBitLayout,
    dequantize_4bit,
    dequantize_nested_4bit,
    matmul_4bit,
    matmul_t_4bit,
    quantize_4bit,
)
from veneer.ops.four_bit_codes import NESTED, code_table
from veneer.quant.double_quant import CompressedAbsmax, absmax_table, compress_absmax, expand_absmax
from veneer.quant.product import CodedWeight
from veneer.quant.spec import Parts, part_problems

STATE_KEY = "weight.quant_state.bitsandbytes__"
_AGAIN = "save or download the checkpoint again"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_STATE_TYPES: dict[str, Callable[[Any], bool]] = {
    "quant_type": lambda value: isinstance(value, str),
    "blocksize": _is_whole,
    "dtype": lambda value: isinstance(value, str),
    "shape": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
}
_NESTED: dict[str, Callable[[Any], bool]] = {"nested_offset": _is_number, "nested_blocksize": _is_whole}


@dataclass(frozen=True, slots=True)
class FourBitWeight(CodedWeight):
    """``W (o, i)`` in packed 4-bit codes.

    ``absmax`` is float32, or uint8 codes that ``nested_absmax`` and ``nested_offset`` scale and shift. If
    ``compute_dtype`` is None, products are computed in the dtype of the input.
    """

    packed: UInt8[Tensor, "bytes 1"]
    absmax: Float32[Tensor, " blocks"] | UInt8[Tensor, " blocks"]
    layout: FourBitLayout
    compute_dtype: torch.dtype | None = None
    nested_absmax: Float32[Tensor, " nested_blocks"] | None = None
    nested_offset: Float32[Tensor, ""] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.layout.shape
        return o, i

    @property
    def nbytes(self) -> int:
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        if x.dtype == torch.float64:  # exact arithmetic for checks; the kernels stop at float32
            dense = self.dense(torch.float64)
            return x @ (dense if transposed else dense.T)
        run = matmul_t_4bit if transposed else matmul_4bit
        return run(x, self.packed, self.scales(), self.layout)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        wide = torch.float32 if dtype == torch.float64 else dtype
        if self.nested_absmax is not None and self.nested_offset is not None and self.packed.is_cuda:
            nested = self.absmax, self.nested_absmax, self.nested_offset
            dense = dequantize_nested_4bit(
                self.packed, nested, absmax_table(self.packed.device), self.layout, dtype=wide
            )
        else:
            dense = dequantize_4bit(self.packed, self.scales(), self.layout, dtype=wide)
        return dense.to(dtype) if dtype == torch.float64 else dense

    def scales(self) -> Float32[Tensor, " blocks"]:
        """Return the absmax of each block."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        return expand_absmax(CompressedAbsmax(self.absmax, self.nested_absmax, self.nested_offset))


@dataclass(frozen=True, slots=True)
class FourBitSpec:
    """Specification of a matrix in 4 bits. ``layout.dtype`` is the original dtype; ``double_quant`` stores
    absmax in 8 bits.
    """

    layout: FourBitLayout
    double_quant: bool = False
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.layout.shape
        return o, i

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        blocks = self.layout.n_blocks
        layout = {
            "weight": (torch.uint8, (self.layout.n_bytes, 1)),
            "absmax": (torch.uint8 if self.double_quant else torch.float32, (blocks,)),
        }
        if self.double_quant:
            layout["nested_absmax"] = (torch.float32, (-(-blocks // NESTED),))
            layout["nested_offset"] = (torch.float32, ())
        return layout

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        packed, absmax = quantize_4bit(weight, self.layout.quant_type, self.layout.block_size)
        parts = {"weight": packed.view(-1, 1), "absmax": absmax}
        if self.double_quant:
            small = compress_absmax(absmax)
            parts |= {"absmax": small.codes, "nested_absmax": small.scale, "nested_offset": small.offset}
        return {name: _alone(part) for name, part in parts.items()}

    def bind(self, parts: Parts) -> FourBitWeight:
        return FourBitWeight(
            parts["weight"],
            parts["absmax"],
            self.layout,
            self.compute_dtype,
            parts.get("nested_absmax"),
            parts.get("nested_offset"),
        )

    def owns(self, key: str) -> bool:
        return key == "weight" or key.startswith("weight.")

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        state: dict[str, Any] = {
            "quant_type": self.layout.quant_type,
            "blocksize": self.layout.block_size,
            "dtype": _name(self.layout.dtype),
            "shape": list(self.layout.shape),
        }
        disk = {
            "weight": parts["weight"],
            "weight.absmax": parts["absmax"],
            "weight.quant_map": code_table(self.layout.quant_type).clone(),
        }
        if self.double_quant:
            disk["weight.nested_absmax"] = parts["nested_absmax"]
            disk["weight.nested_quant_map"] = dynamic_map().clone()
            state |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": parts["nested_offset"].item(),
            }
        text = json.dumps(state).encode()
        disk[STATE_KEY + self.layout.quant_type] = torch.tensor(list(text), dtype=torch.uint8)
        return disk

    def from_disk(self, tensors: Parts) -> tuple[FourBitSpec, dict[str, Tensor]]:
        stored = _read_state(tensors)
        layout, double_quant, problems = _layout_of(stored, self.shape)
        spec = replace(self, layout=layout, double_quant=double_quant)
        parts = {"weight": _as_bytes(tensors.get("weight")), "absmax": tensors.get("weight.absmax")}
        if double_quant:
            parts["nested_absmax"] = tensors.get("weight.nested_absmax")
            parts["nested_offset"] = torch.tensor(stored["nested_offset"], dtype=torch.float32)
            problems += _map_problems("weight.nested_quant_map", tensors, dynamic_map())
        problems += _map_problems("weight.quant_map", tensors, code_table(layout.quant_type))
        problems += part_problems(parts, spec.part_layout())
        if problems:
            raise FormatError(
                f"a 4-bit weight of shape {self.shape} cannot be read: {'; '.join(problems)}. {_AGAIN.capitalize()}"
            )
        device = tensors["weight"].device
        return spec, {name: part.to(device).contiguous() for name, part in parts.items() if part is not None}


def quantize(
    weight: Float[Tensor, "o i"],
    quant_type: str,
    *,
    double_quant: bool = True,
    block_size: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> FourBitWeight:
    """Return a weight in 4 bits. Raises ConfigError (unknown type or block size), ShapeError, NonFiniteError."""
    layout = FourBitLayout((weight.shape[0], weight.shape[1]), quant_type, block_size, weight.dtype)
    spec = FourBitSpec(layout, double_quant, compute_dtype)
    return spec.bind(spec.quantize(weight))


def _alone(part: Tensor) -> Tensor:
    """Return the tensor, copied if it is a view, which would keep the memory of the whole stack of blocks alive."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _read_state(tensors: Parts) -> dict[str, Any]:
    keys = [key for key in tensors if key.startswith(STATE_KEY)]
    if len(keys) != 1:
        raise FormatError(f"a 4-bit weight needs exactly one tensor named {STATE_KEY}…, found {keys}: {_AGAIN}")
    text = tensors[keys[0]]
    if text.dtype != torch.uint8 or text.dim() != 1:
        raise FormatError(
            f"{keys[0]} is {text.dtype} {tuple(text.shape)}, it should be the bytes of a JSON text: {_AGAIN}"
        )
    try:
        state = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{keys[0]} is not JSON ({error}): {_AGAIN}") from error
    if not isinstance(state, dict) or not _STATE_TYPES.keys() <= state.keys():
        raise FormatError(f"{keys[0]} must hold {sorted(_STATE_TYPES)}, it holds {state!r:.200}: {_AGAIN}")
    wrong = [
        f"{key} is {state[key]!r:.60}"
        for key, fits in (_STATE_TYPES | _NESTED).items()
        if key in state and not fits(state[key])
    ]
    if wrong:
        raise FormatError(f"{keys[0]} cannot be read: {'; '.join(wrong)}. Its checkpoint is damaged: {_AGAIN}")
    return state


def _layout_of(state: dict[str, Any], shape: tuple[int, int]) -> tuple[FourBitLayout, bool, list[str]]:
    """Return the layout that a stored quant_state describes, whether absmax is quantized too, and a message for each
    value that does not fit.

    Raises FormatError if the state names no known dtype or layout.
    """
    problems = []
    dtype = getattr(torch, state["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"the quant_state names dtype {state['dtype']!r}, which is none of torch's: {_AGAIN}")
    if tuple(state["shape"]) != shape:
        problems.append(f"it was stored for shape {tuple(state['shape'])}, and its layer is {shape}")
    double_quant = "nested_offset" in state
    if double_quant and state.get("nested_blocksize") != NESTED:
        problems.append(f"nested_blocksize is {state.get('nested_blocksize')!r}, only {NESTED} is in use")
    try:
        return FourBitLayout(shape, state["quant_type"], state["blocksize"], dtype), double_quant, problems
    except ConfigError as error:
        raise FormatError(f"the quant_state describes a {error}: {_AGAIN}") from error


def _as_bytes(packed: Tensor | None) -> Tensor | None:
    """Return the packed codes as uint8 (n, 1), whatever dtype they are stored in (``bnb_4bit_quant_storage``); None for
    None.
    """
    return None if packed is None else packed.reshape(-1).contiguous().view(torch.uint8).view(-1, 1)


def _map_problems(key: str, tensors: Parts, expected: Tensor) -> list[str]:
    """Return a message, alone in a list, if a stored code table is missing or differs from ``expected``."""
    found = tensors.get(key)
    if found is None:
        return [f"{key} is missing"]
    if found.shape != expected.shape or not torch.allclose(found.float().cpu(), expected.cpu(), atol=1e-6):
        return [f"{key} is another table of codes than the standard one"]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
