"""Frozen weight in the layout that its product reads in one pass: packed once, for one row and for a thousand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (torch.float32, torch.bfloat16)
BLOCK, BLOCKS, DEPTH_UNIT = 16, 4, 32


def packed_depth(i: int, dtype: torch.dtype) -> int:
    """Return the number of values of each output in a packed weight: i, in bfloat16 zero-padded to a multiple of 32."""
    return -(-i // DEPTH_UNIT) * DEPTH_UNIT if dtype == torch.bfloat16 else i


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """Weight ``W (o, i)`` in consecutive panels of 64 outputs in ``panels``, which is flat and of W's dtype.

    In a panel the values of one input are neighbours (in bfloat16, of two inputs). The last panel is a multiple of 16
    outputs wide, padded with zeros. csrc/core/panels.h documents the layout.
    """

    panels: Tensor
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight: Float[Tensor, "o i"], *, backend: str | None = None) -> PackedWeight:
        """Return ``weight``, of float32, bfloat16 or float16, packed as a copy. Raises ShapeError."""
        if weight.ndim != 2 or weight.dtype not in FLOATS:
            raise ShapeError(
                f"a packed weight is made from a matrix of {_names(FLOATS)}; given {weight.dtype} {tuple(weight.shape)}"
            )
        o, i = weight.shape
        panels: Tensor = implementation("packed.pack", weight.device, backend)(
            weight.detach(), packed_depth(i, weight.dtype)
        )
        return cls(panels, (o, i))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.panels.dtype

    @property
    def depth(self) -> int:
        """Number of values of each output in the panels."""
        return packed_depth(self.shape[1], self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, with their padding."""
        return self.panels.nbytes

    def dense(self, *, backend: str | None = None) -> Float[Tensor, "o i"]:
        """Return the original weight, bit for bit."""
        unpack = implementation("packed.unpack", self.panels.device, backend)
        out: Tensor = unpack(self.panels, self.shape, self.depth)
        return out

    def matmul(
        self,
        x: Float[Tensor, "n i"],
        *,
        onto: Float[Tensor, "n o"] | None = None,
        out: Float[Tensor, "n o"] | None = None,
        backend: str | None = None,
    ) -> Float[Tensor, "n o"]:
        """Return ``onto + W x`` for rows of float32 or bfloat16, written into ``out`` if given. For inference alone.

        Products and sums are float32 (x is never rounded) and rounded once, to the dtype of out, of onto, or of x. Each
        sum runs over the inputs in an order set by the weight alone. A row's result is the same, bit for bit, whatever
        and however many the other rows are. ``onto`` may be ``out``, or an expanded bias. Only last axes must be
        contiguous.

        Raises ShapeError.
        """
        check_product(self.shape, x, onto, out)
        if out is None:
            out = x.new_empty(x.shape[0], self.shape[0], dtype=x.dtype if onto is None else onto.dtype)
        implementation("packed.matmul", x.device, backend)(self, x, onto, out)
        return out


def check_product(shape: tuple[int, int], x: Tensor, onto: Tensor | None, out: Tensor | None) -> None:
    """Raise ShapeError for rows that do not fit a packed weight (o, i)."""
    o, i = shape
    if x.ndim != 2 or x.shape[1] != i or x.dtype not in ROWS:
        raise ShapeError(f"x must be (n, {i}) of {_names(ROWS)}; given {tuple(x.shape)} {x.dtype}")
    for name, y in (("onto", onto), ("out", out)):
        if y is not None and (y.shape != (x.shape[0], o) or y.dtype not in ROWS or (o > 1 and y.stride(1) != 1)):
            raise ShapeError(
                f"{name} must be ({x.shape[0]}, {o}) of {_names(ROWS)}, its last axis contiguous; given "
                f"{tuple(y.shape)} {y.dtype}, strides {y.stride()}"
            )
    if onto is not None and out is not None and onto.dtype != out.dtype:
        raise ShapeError(f"onto and out must be of one dtype; given {onto.dtype} and {out.dtype}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def over_rows(bias: Tensor | None, n: int) -> Tensor | None:
    """Return a bias (o,) expanded to (n, o), as a view; None without a bias."""
    return None if bias is None else bias.expand(n, -1)
