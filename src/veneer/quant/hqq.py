"""HQQ's layout on disk: ``W_q``, ``scale``, ``zero``, and the settings of a layer as tensors.

Source: Badri, Shaji 2023, Half-Quadratic Quantization (mobiusml.github.io/hqq_blog). A row of the matrix that is packed
is a group. A byte holds values of several groups: the first groups are in its highest bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from veneer.ops.bits import pack, unpack
from veneer.quant.grouped import GroupedSpec, group_problems
from veneer.quant.spec import Parts, scale_problems, unreadable

BITS = (1, 2, 3, 4, 5, 6, 8)
_PACKINGS = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8"}
_WHOLE = "8bit_u8"
_PER_WORD = {"1bit_u8": 8, "2bit_u8": 4, "3bit_32": 10, "4bit_u8": 2, _WHOLE: 1}
_FLAGS = {
    **{"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "channel_wise": 1, "optimize": 1, "round_zero": 0},
    **{"offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1},
}
PARTS = frozenset(
    {"W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "compute_dtype"}
    | _FLAGS.keys()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HqqSpec(GroupedSpec):
    """Specification of a matrix stored by HQQ, with groups of inputs (axis 1)."""

    def owns(self, key: str) -> bool:
        return key in PARTS

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        codes = unpack(parts["weight"], self.bits, self.shape[1]).reshape(-1, self.group_width)
        dtype = str(parts["scales"].dtype)
        word = "torch.int32" if self.bits == 3 else "torch.uint8"
        texts = {"packing": self._packing, "unpack_view_dtype": word, "compute_dtype": dtype}
        numbers = {"nbits": self.bits, "group_size": self.group_width, "axis": 1}
        return {
            "W_q": _stacked(codes, self.bits, _PER_WORD[self._packing]),
            "scale": parts["scales"].reshape(-1, 1),
            "zero": parts["zeros"].reshape(-1, 1),
            "shape": torch.tensor(self.shape),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in _FLAGS.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
        }

    def from_disk(self, tensors: Parts) -> tuple[HqqSpec, dict[str, Tensor]]:
        problems = self._problems(tensors)
        if problems:
            raise unreadable(f"HQQ with {self.bits} bits", self.shape, problems)
        (o, i), size = self.shape, (self.shape[0], self.n_groups)
        codes = _unstacked(tensors["W_q"], self.bits, _PER_WORD[self._packing])[: o * self.n_groups]
        scales, zeros = tensors["scale"].reshape(size), tensors["zero"].reshape(size)
        parts = {
            "weight": pack(codes.reshape(o, i), self.bits),
            "scales": scales.contiguous(),
            "zeros": zeros.contiguous(),
        }
        return replace(self, scale_dtype=scales.dtype, zeros=zeros.dtype), parts

    @property
    def _packing(self) -> str:
        return _PACKINGS.get(self.bits, _WHOLE)

    def _problems(self, tensors: Parts) -> list[str]:
        problems = group_problems(self)
        said = {"nbits": self.bits, "group_size": self.group_width, "axis": 1, "view_as_float": 0}
        said |= {"quant_scale": 0, "quant_zero": 0}
        for name, wanted in said.items():
            found = tensors.get(name)
            if found is not None and found.numel() == 1 and int(found) != wanted:
                problems.append(f"{name} is {int(found)}, it should be {wanted}")
        found = tensors.get("packing")
        if found is not None and bytes(found.tolist()) != self._packing.encode():
            problems.append(f"packing is {bytes(found.tolist())!r}, it should be {self._packing!r}")
        found = tensors.get("shape")
        if found is not None and tuple(found.tolist()) != self.shape:
            problems.append(f"shape says {tuple(found.tolist())}")
        if problems:
            return problems
        n_rows, per_word = self.shape[0] * self.n_groups, _PER_WORD[self._packing]
        wanted_codes = (torch.int32 if self.bits == 3 else torch.uint8, (-(-n_rows // per_word), self.group_width))
        codes = tensors.get("W_q")
        if codes is None or (codes.dtype, tuple(codes.shape)) != wanted_codes:
            text = "missing" if codes is None else f"{codes.dtype} {tuple(codes.shape)}"
            problems.append(f"W_q is {text}, it should be {wanted_codes[0]} {wanted_codes[1]}")
        scale, zero = tensors.get("scale"), tensors.get("zero")
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor is None or tensor.numel() != n_rows:
                text = "missing" if tensor is None else str(tuple(tensor.shape))
                problems.append(f"{name} is {text}, it should be {(n_rows, 1)}")
        if problems or scale is None or zero is None:
            return problems
        problems = scale_problems("scale", scale)
        if zero.dtype != scale.dtype or not bool(zero.isfinite().all()):
            problems.append(f"zero is {zero.dtype}, or not finite: it should be finite numbers in {scale.dtype}")
        return problems


def _stacked(codes: UInt8[Tensor, "rows group"], bits: int, per_word: int) -> Tensor:
    """Split the rows into ``per_word`` equal parts, and pack one code of each part into a word, the first part's in the
    highest bits.

    The last part is padded with zeros.
    """
    dtype = torch.int32 if bits == 3 else torch.uint8
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per_word)).to(dtype)
    step = 8 if per_word == 1 else bits
    word = torch.zeros(len(filled) // per_word, codes.shape[1], dtype=dtype, device=codes.device)
    for place, part in enumerate(filled.chunk(per_word)):
        word |= part << step * (per_word - 1 - place)
    return word


def _unstacked(words: Tensor, bits: int, per_word: int) -> UInt8[Tensor, "rows group"]:
    step = 8 if per_word == 1 else bits
    mask = (1 << bits) - 1
    parts = [(words >> step * (per_word - 1 - place) & mask).to(torch.uint8) for place in range(per_word)]
    return torch.cat(parts)
