"""Linear layer with a quantized frozen weight. Its state dict has the keys and bytes of the format's library."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.model.quantized.module import CodedModule
from veneer.quant.product import CodedWeight
from veneer.quant.spec import StorageSpec
from veneer.records.frozen import FrozenWeight


class QuantLinear(CodedModule):
    """Linear layer ``y = W x + bias`` with W in the storage format of ``spec``.

    ``source`` is the class of the replaced layer: GPT-2's Conv1D stores Wᵀ, a quantized layer always W.
    """

    bias: nn.Parameter | None

    def __init__(
        self, spec: StorageSpec, bias: nn.Parameter | None = None, source: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__(spec)
        self.source = source
        self.out_features, self.in_features = spec.shape
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def from_dense(cls, module: nn.Module, spec: StorageSpec) -> Self:
        """Return a quantized copy of an ``nn.Linear`` or ``Conv1D``, which shares the bias. Raises NonFiniteError for a
        weight with values that are not finite.
        """
        layer = cls(spec, cast("nn.Parameter | None", module.bias), Conv1D if isinstance(module, Conv1D) else nn.Linear)
        weight = cast(Tensor, module.weight)
        layer.fill(spec, spec.quantize(weight.T if layer.is_transposed else weight))
        return layer.train(module.training)

    @property
    def is_transposed(self) -> bool:
        """Return True if the replaced layer stores Wᵀ."""
        return issubclass(self.source, Conv1D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen_format().matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def frozen_format(self) -> FrozenWeight:
        """Return the layer's quantized weight."""
        return self.bound()

    def to_dense(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Module:
        """Return a dense layer with the dequantized weight, to replace this one, in ``dtype`` (None: the dtype of the
        layer before it was quantized).

        ``weight`` (o, i), if given, is used instead of the dequantized weight.
        """
        weight = self.frozen_format().dense(dtype) if weight is None else weight
        size = (self.out_features, self.in_features) if self.is_transposed else (self.in_features, self.out_features)
        with torch.device("meta"):
            dense = Conv1D(*size) if self.is_transposed else nn.Linear(*size, bias=self.bias is not None)
        dense.weight = nn.Parameter(weight.T.contiguous() if self.is_transposed else weight, requires_grad=False)
        bias = self.bias
        dense.bias = None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def computing_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes that a model computes in: those of its parameters, and of its quantized layers."""
    weights = [module.frozen_format() for module in model.modules() if isinstance(module, QuantLinear)]
    asked = {weight.compute_dtype for weight in weights if isinstance(weight, CodedWeight)}
    return {dtype for dtype in (next(model.parameters()).dtype, *asked) if dtype is not None}
