"""Linear layer with a quantized frozen weight. Its state dict has the keys and bytes of the format's library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.core.frozen import FrozenWeight
from veneer.errors import FormatError
from veneer.quant.product import CodedWeight
from veneer.quant.spec import StorageSpec


class QuantLinear(nn.Module):
    """Linear layer ``y = W x + bias`` with W in the storage format of ``spec``.

    The tensors of the format are buffers, ``weight`` first; until `fill` sets them, the weight is on the meta device.
    ``source`` is the class of the replaced layer: GPT-2's Conv1D stores Wᵀ, a quantized layer always W. Casting the
    module (``.half()``, ``.to(dtype)``) leaves the format unchanged: its scales are part of the weight.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, spec: StorageSpec, bias: nn.Parameter | None = None, source: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.spec, self.source = spec, source
        self.out_features, self.in_features = spec.shape
        for name, (dtype, shape) in spec.part_layout().items():
            empty = torch.empty(shape, dtype=dtype, device="meta") if name == "weight" else None
            self.register_buffer(name, empty)
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def from_dense(cls, module: nn.Module, spec: StorageSpec) -> Self:
        """Return a quantized copy of an ``nn.Linear`` or ``Conv1D``; the bias is shared. Raises NonFiniteError."""
        layer = cls(spec, cast("nn.Parameter | None", module.bias), Conv1D if isinstance(module, Conv1D) else nn.Linear)
        weight = cast(Tensor, module.weight)
        layer.fill(spec, spec.quantize(weight.T if layer.is_transposed else weight))
        return layer.train(module.training)

    @property
    def is_transposed(self) -> bool:
        """True if the replaced layer stores Wᵀ."""
        return issubclass(self.source, Conv1D)

    @property
    def is_filled(self) -> bool:
        """True if the weight has been set."""
        return not self.weight.is_meta

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen_format().matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def frozen_format(self) -> FrozenWeight:
        """Return the layer's quantized weight."""
        return self.spec.bind(self.parts())

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of the storage format that have been set."""
        held = self._buffers
        if "weight" not in held:  # frozen parameters: see `freeze_parts`
            held = {**held, **self._parameters}
        return {name: t for name in self.spec.part_layout() if (t := held.get(name)) is not None}

    def freeze_parts(self) -> None:
        """Hold the tensors of the format as frozen parameters, which alone FSDP cuts; single numbers stay buffers."""
        for name, part in self.parts().items():
            if part.ndim:
                del self._buffers[name]
                self._parameters[name] = nn.Parameter(part, requires_grad=False)  # adapters may read `weight` otherwise

    def fill(self, spec: StorageSpec, parts: dict[str, Tensor]) -> None:
        """Set the layer's weight. Raises FormatError if the spec is for another shape."""
        if spec.shape != (self.out_features, self.in_features):
            raise FormatError(
                f"a weight of shape {spec.shape} does not fit a layer ({self.out_features}, {self.in_features})"
            )
        for name in self.spec.part_layout():
            del self._buffers[name]
        self.spec = spec
        for name in spec.part_layout():
            self.register_buffer(name, parts[name])

    def to_dense(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Module:
        """Return a dense layer in place of this one, with the dequantized weight; ``dtype`` None keeps the original
        dtype.

        ``weight`` (o, i) replaces the layer's own.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the format's tensors with the module, and keep their dtypes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        names = self.spec.part_layout()
        kept = {name: self._buffers.pop(name) for name in names if name in self._buffers}
        cut = {name: self._parameters.pop(name) for name in names if name in self._parameters}  # FSDP moves them
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters |= cut
            for name, tensor in kept.items():
                self._buffers[name] = None if tensor is None else move(tensor)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        disk = self.spec.to_disk(self.parts()) if self.is_filled else {"weight": self.weight}
        destination |= {prefix + key: tensor for key, tensor in disk.items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        known = {key for key in own if self.spec.owns(key)}
        if known:
            try:
                spec, parts = self.spec.from_disk(own)
                device = torch.device("cpu") if self.weight.is_meta else self.weight.device
                self.fill(spec, {name: part.to(device, copy=True) for name, part in parts.items()})
            except FormatError as error:
                error_msgs.append(f"{prefix}weight: {error}")
        else:
            missing_keys.append(f"{prefix}weight")
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in known}
        kept = {name: self._buffers.pop(name) for name in self.spec.part_layout()}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._buffers |= kept


def computing_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes that a model computes in: those of its parameters, and of its quantized layers."""
    weights = [module.frozen_format() for module in model.modules() if isinstance(module, QuantLinear)]
    asked = {weight.compute_dtype for weight in weights if isinstance(weight, CodedWeight)}
    return {dtype for dtype in (next(model.parameters()).dtype, *asked) if dtype is not None}
