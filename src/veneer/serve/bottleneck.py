"""A bottleneck's matrices packed once, so that a row's result does not depend on those beside it."""

from __future__ import annotations

from torch import Tensor

from veneer.core.records import ResidualDelta
from veneer.core.residual import ACTIVATIONS, residual_change
from veneer.ops.packed import ROWS, PackedWeight, over_rows


class Bottleneck:
    """The formula of a `ResidualDelta`; ``reads_output``: its x is what it changes."""

    def __init__(self, record: ResidualDelta) -> None:
        self.record, self.reads_output = record, record.where == "serial"
        fits = record.down.dtype in ROWS and record.down.device.type == "cpu"
        self.down, self.up = (PackedWeight.pack(w) if fits else None for w in (record.down, record.up))

    def change(self, x: Tensor) -> Tensor:
        """The change that it adds to rows (n, d), in its own dtype."""
        record = self.record
        if self.down is None or self.up is None:
            return residual_change(record, x)
        inner = self.down.matmul(x.to(record.down.dtype), onto=over_rows(record.down_bias, len(x)))
        return (
            self.up.matmul(ACTIVATIONS[record.activation](inner), onto=over_rows(record.up_bias, len(x))) * record.scale
        )
