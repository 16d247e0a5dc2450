"""Reading a norm or a linear layer of a model for a fused block: what the kernels need of it, or that it is special."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.core.records import LinearDelta
from veneer.model.inplace import InPlace, base_of
from veneer.model.linear import AdaptedLinear, frozen_weight
from veneer.model.quant_linear import QuantLinear
from veneer.ops.lora import Projection
from veneer.ops.norm import rms_norm_backward, rms_norm_forward
from veneer.quant.dense import DenseWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """An RMSNorm of the model: weight, epsilon, and what is added to the weight (Gemma: 1)."""

    weight: Tensor
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the statistics that `backward` reads."""
        return rms_norm_forward(x, self.weight, self.eps, self.offset)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        """The gradient in x."""
        return rms_norm_backward(dy, x, self.weight, rstd, self.offset)[0]


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module does nothing but run its class's forward."""
    return not any(getattr(module, hooks) for hooks in HOOKS) and "forward" not in vars(module)


def norm_offset(module: nn.Module) -> float | None:
    """0 or 1 where the module is an RMSNorm that multiplies by its weight plus that; None where it is neither.

    Found by its values: families disagree on it under the same names.
    """
    weight, eps = getattr(module, "weight", None), epsilon_of(module)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or eps is None or getattr(module, "bias", None) is not None:
        return None
    x = torch.linspace(-1.5, 2.5, weight.shape[0], device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        given = module(x).double()
        wide = x.double()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            if (given - wide * (weight.double() + offset)).norm() <= 1e-2 * given.norm():
                return offset
    return None


def epsilon_of(module: nn.Module) -> float | None:
    """The epsilon of a norm, by the names that families give it."""
    return next((float(getattr(module, name)) for name in EPSILONS if hasattr(module, name)), None)


def norm_of(module: nn.Module, offset: float, dtype: torch.dtype) -> RmsNorm | None:
    """The norm as the kernels take it; None where it is trained, hooked, or kept in another dtype than x."""
    if not is_plain(module) or isinstance(module, InPlace):  # reading a weight that rows have copies of raises
        return None
    weight = cast(Tensor, module.weight)
    if weight.requires_grad or weight.dtype != dtype:
        return None
    return RmsNorm(weight, cast(float, epsilon_of(module)), offset)


def projection_of(module: nn.Module, dtype: torch.dtype) -> Projection | None:
    """A frozen layer with at most one plain low-rank pair on it; None where anything else acts on it.

    Anything else: other records (DoRA, IA3, biases), several adapters, dropout, trained or copied weights, hooks.
    """
    own = base_of(type(module)) if isinstance(module, AdaptedLinear) else type(module)
    if own not in (nn.Linear, Conv1D, QuantLinear) or not is_plain(module):
        return None
    delta = _delta_of(module) if isinstance(module, AdaptedLinear) else LinearDelta()
    bias = cast("Tensor | None", module._parameters.get("bias"))
    weight = frozen_weight(module)
    if delta is None or (bias is not None and bias.requires_grad):
        return None
    matrix: Any = weight
    if isinstance(weight, DenseWeight):
        matrix = weight.tensor
        if matrix.requires_grad or matrix.dtype != dtype:
            return None
    return Projection(
        weight=matrix,
        bias=None if bias is None else bias.to(dtype),
        a=delta.a,
        b=delta.b,
        scale=delta.scale,
    )


def _delta_of(module: AdaptedLinear) -> LinearDelta | None:
    """The record that acts on an adapted layer, where it is nothing but a low-rank pair, or nothing at all."""
    routing = module.adapter_state.routed()
    if routing is not None:  # rows take adapters of their own: the kernels know one pair for all rows
        return None if any(map(module.holds, routing.adapters)) else LinearDelta()
    names = module.acting_here()
    copied = any(name in module.copies for name in module.adapter_state.acting())
    if len(names) > 1 or copied or "merged_weight" in vars(module):
        return None
    if not names:
        return LinearDelta()
    name = names[0]
    config = module.method(name)
    known = module.__dict__.get("_fused_kind")  # (config, fits): lowering DoRA costs a pass over W
    if (known is not None and known[0] is config and not known[1]) or (module.training and config.dropout):
        return None
    record = module.record(name)
    fits = record.rank > 0 and record.in_scale is None and record.out_scale is None and record.bias is None
    module.__dict__["_fused_kind"] = (config, fits)
    return record if fits else None
