"""Product in float32 whatever the dtype of the stream: the scores of routers that are computed so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.model.program.acting import Acting
from veneer.model.program.linears import Linears
from veneer.model.program.operation import Frame
from veneer.model.program.product import Product
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch
from veneer.ops.cpu.step import StepProgram
from veneer.ops.linear.layer import LinearLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class WideProduct(Product):
    """`Product` whose layers compute in float32, or in a wider dtype if the stream has one. The output has that dtype
    too.
    """

    def forward(self, weights: Linears, rows: PassRows, frame: Frame) -> None:
        x = frame[self.source.name]
        self.target.write(frame, weights(x.to(_wide(x.dtype)), rows.versions, rows.runs))

    def emit(self, weights: Linears, step: StepProgram) -> bool:
        return step.dtype == torch.float32 and Product.emit(self, weights, step)

    def acting(self, at: Acting) -> tuple[LinearLayer, ...] | None:
        wide = _wide(at.dtype)
        found = Product.acting(self, at) or Product.acting(self, replace(at, dtype=wide))
        return None if found is None else tuple(_widened(layer, wide) for layer in found)

    def dtype_in(self, run: ActingStretch) -> torch.dtype:
        return _wide(run.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(layer: LinearLayer, dtype: torch.dtype) -> LinearLayer:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return replace(layer, weight=layer.weight.to(dtype), bias=bias) if isinstance(layer.weight, Tensor) else layer
