"""Bottleneck whose matrices are packed once, so that a row's result does not depend on the other rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from veneer.ops.packed import ROWS
from veneer.ops.pairs import FactorPair, PackedPairs, Segment, add_pairs
from veneer.records.deltas import ResidualDelta
from veneer.records.residual import residual_change

_NAMES = {"gelu_new": "gelu_tanh", "swish": "silu", "leakyrelu": "leaky_relu"}


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """Bottleneck of a `ResidualDelta`, for rows of a dtype. If ``reads_output``, the bottleneck reads the tensor that
    it changes.

    ``pairs`` are the bottleneck's matrices packed in that dtype. If no kernels support them, ``pairs`` is None and
    ``record`` is used.
    """

    reads_output: bool
    pairs: PackedPairs | None
    record: ResidualDelta | None

    @classmethod
    def of(cls, record: ResidualDelta, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the bottleneck of a record, for rows of a dtype on a device."""
        fits = dtype in ROWS and device.type == "cpu"
        return cls(record.where == "serial", _packed(record, dtype) if fits else None, None if fits else record)

    def change(self, x: Tensor, y: Tensor) -> None:
        """Add the bottleneck's change, computed from x (n, d), to y (n, d), which may be x."""
        if self.pairs is not None:
            add_pairs(x, [Segment(self.pairs, 0, len(x))], [y])
        elif self.record is not None:
            y += residual_change(self.record, x).to(y.dtype)


def _packed(record: ResidualDelta, dtype: torch.dtype) -> PackedPairs:
    pair = FactorPair(
        record.down,
        record.up,
        record.scale,
        a_bias=record.down_bias,
        b_bias=None if record.up_bias is None else record.up_bias.float() * record.scale,
        activation=_NAMES.get(record.activation, record.activation),
    )
    return PackedPairs.pack([pair], [len(record.up)], dtype=dtype)
