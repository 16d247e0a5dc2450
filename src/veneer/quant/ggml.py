"""Frozen weight in ggml's blocks (Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, and plain F32, F16, BF16).

The blocks may lie in a mapped GGUF file: nothing is copied. Their rows may be in another order than the model's: files
of Llama have the rows of q and k in neighbouring pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float32, Int, Int32, UInt8
from torch import Tensor

from veneer.disk.mapped import MappedFile
from veneer.errors import ConfigError, FormatError
from veneer.ops.code_groups import CodeGroups
from veneer.ops.ggml import dequantize_ggml, groups_ggml, has_product, matmul_ggml, quantize_ggml, row_bytes
from veneer.ops.ggml_types import GGML_TYPES
from veneer.quant.blocks import BlockWeight
from veneer.quant.spec import Parts, part_problems

NAME = "ggml"
UNDIVIDED = "F16"  # llama-quantize's type of a matrix whose rows no block divides


@dataclass(frozen=True, slots=True)
class GgmlWeight(BlockWeight):
    """Frozen weight ``W (o, i)`` in ggml's type ``kind``. Row r is decoded from ``blocks[r]``, or from
    ``blocks[order[r]]`` if ``order`` is given.

    ``source`` is the mapped file that holds the blocks, if there is one. Reading raises FormatError once the file has
    changed.
    """

    blocks: UInt8[Tensor, "o bytes"]
    kind: str
    order: Int32[Tensor, " o"] | None = None
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    source: MappedFile | None = None

    @property
    def shape(self) -> tuple[int, int]:
        kind = GGML_TYPES[self.kind]
        return self.blocks.shape[0], self.blocks.shape[1] // kind.n_bytes * kind.block

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + (0 if self.order is None else self.order.nbytes)

    def rows(self, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k i"]:
        self._require_unchanged()
        if self.order is None and isinstance(index, slice):
            return dequantize_ggml(self.blocks[index], self.kind)
        places = index if self.order is None else self.order[index]
        return dequantize_ggml(self.blocks, self.kind, cast(Tensor, places))

    @property
    def is_narrow(self) -> bool:
        """Return True if values have levels and scales, which is so for all types except F32, F16 and BF16."""
        return GGML_TYPES[self.kind].block > 1

    def groups(self, rows: slice) -> CodeGroups:
        """Return the levels and scales of some rows. The type must be one for which `is_narrow` is True."""
        self._require_unchanged()
        if self.order is None:
            return groups_ggml(self.blocks[rows], self.kind)
        return groups_ggml(self.blocks, self.kind, self.order[rows])

    def few_rows(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"] | None:
        if not has_product(x, self.kind):
            return None
        self._require_unchanged()
        return matmul_ggml(x, self.blocks, self.kind, self.order)

    def _require_unchanged(self) -> None:
        if self.source is not None:
            self.source.require_unchanged()


@dataclass(frozen=True, slots=True)
class GgmlSpec:
    """Storage format of a matrix in ggml's type ``kind``. If ``reordered``, the file holds the rows in an order other
    than the layer's.
    """

    shape: tuple[int, int]
    kind: str
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    reordered: bool = False
    source: MappedFile | None = None

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        o, i = self.shape
        order = {"order": (torch.int32, (o,))} if self.reordered else {}
        return {"weight": (torch.uint8, (o, row_bytes(self.kind, i))), **order}

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return the weight quantized by ggml's own search. Raises ConfigError if there is a ``source`` file."""
        if self.source is not None:
            raise ConfigError(
                f"a weight in the blocks of {self.source.path} cannot be quantized again in place: merge into 16 "
                "bits, and write the result with `veneer export gguf`."
            )
        if not self.reordered:
            return {"weight": quantize_ggml(weight, self.kind)}
        order = torch.arange(self.shape[0], dtype=torch.int32, device=weight.device)
        return {"weight": quantize_ggml(weight, self.kind), "order": order}

    def bind(self, parts: Parts) -> GgmlWeight:
        return GgmlWeight(
            parts["weight"], self.kind, parts.get("order"), self.dtype, self.compute_dtype, source=self.source
        )

    def owns(self, key: str) -> bool:
        return key == "weight" or key.startswith("weight.")

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        return {"weight" if name == "weight" else f"weight.{name}": part for name, part in parts.items()}

    def from_disk(self, tensors: Parts) -> tuple[GgmlSpec, dict[str, Tensor]]:
        parts = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
        found = {name: part for name in self.part_layout() if (part := parts.get(name)) is not None}
        problems = part_problems(found, self.part_layout())
        if problems:
            raise FormatError(
                f"a {self.kind} weight of shape {self.shape} cannot be read: {'; '.join(problems)}. "
                "Fetch the file again"
            )
        return self, found


def quantize(
    weight: Float[Tensor, "o i"], kind: str = "Q8_0", *, compute_dtype: torch.dtype | None = None
) -> GgmlWeight:
    """Return a weight in ggml's type ``kind``. If its blocks do not divide a row, it is in F16, as llama-quantize does.

    Raises ConfigError (unknown type), ShapeError, NonFiniteError.
    """
    o, i = weight.shape
    kind = UNDIVIDED if kind in GGML_TYPES and i % GGML_TYPES[kind].block else kind
    spec = GgmlSpec((o, i), kind, weight.dtype, compute_dtype)
    return spec.bind(spec.quantize(weight))
