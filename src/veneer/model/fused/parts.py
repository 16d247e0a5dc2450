"""Reading a norm or a linear layer of a model for a fused block: what the kernels need of it, or that it is special."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from veneer.contract import LinearMethod
from veneer.core.records import LinearDelta
from veneer.model.blueprint.linears import is_linear
from veneer.model.blueprint.norms import epsilon_of
from veneer.model.fused.rows import pairs_of_rows
from veneer.model.inplace import InPlace
from veneer.model.linear import AdaptedLinear, frozen_weight
from veneer.ops.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from veneer.ops.projection import LowRankRows, Projection
from veneer.quant.dense import DenseWeight
from veneer.quant.product import CodedWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NormKind = Literal["rms", "rms plus one", "layer"]


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


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A LayerNorm of the model: weight, bias, epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and mean and reciprocal deviation of each row, (2, n), that `backward` reads."""
        y, mean, rstd = layer_norm_forward(x, self.weight, self.bias, self.eps)
        return y, torch.stack([mean, rstd])

    def backward(self, dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
        """The gradient in x."""
        return layer_norm_backward(dy, x, self.weight, statistics[0], statistics[1])[0]


Norm = RmsNorm | LayerNorm


def computed_in(x: Tensor) -> torch.dtype | None:
    """What linear layers compute in: x's dtype, or what autocast makes of a float32 x; None where autocast asks for
    something else."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    asked = torch.get_autocast_dtype(x.device.type)
    return asked if x.dtype in (asked, torch.float32) else None


def add_onto(stream: Tensor, change: Tensor) -> Tensor:
    """Their sum in the stream's dtype; ``change`` is overwritten where it has the same."""
    return change.add_(stream) if change.dtype == stream.dtype else stream + change


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module does nothing but run its class's forward."""
    return not any(getattr(module, hooks) for hooks in HOOKS) and "forward" not in vars(module)


def norm_of(module: nn.Module, kind: NormKind, dtype: torch.dtype) -> Norm | None:
    """The norm as the kernels take it; None where it is trained, hooked, or kept in another dtype than x."""
    if not is_plain(module) or isinstance(module, InPlace):  # reading a weight that rows have copies of raises
        return None
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
    if any(t is not None and (t.requires_grad or t.dtype != dtype) for t in (weight, bias)):
        return None
    eps = cast(float, epsilon_of(module))
    if kind == "layer":
        return LayerNorm(weight, torch.zeros_like(weight) if bias is None else bias, eps)
    return RmsNorm(weight, eps, 1.0 if kind == "rms plus one" else 0.0)


def projection_of(module: nn.Module, dtype: torch.dtype) -> Projection | None:
    """A frozen layer to compute in ``dtype``, each row with at most one plain low-rank pair; None where more acts.

    More: other records (DoRA, IA3, biases), adapters in a sum, dropout, trained or copied weights, hooks.
    """
    if not is_linear(module) or not is_plain(module):
        return None
    delta, rows = _pairs_of(module) if isinstance(module, AdaptedLinear) else (LinearDelta(), None)
    bias = cast("Tensor | None", module._parameters.get("bias"))
    weight = frozen_weight(module)
    if delta is None or (bias is not None and bias.requires_grad):
        return None
    matrix: Any = weight
    if isinstance(weight, DenseWeight):
        matrix = weight.tensor
        if matrix.requires_grad or matrix.dtype != dtype:
            return None
    elif isinstance(weight, CodedWeight) and torch.is_autocast_enabled(cast(Tensor, module.weight).device.type):
        matrix = replace(cast(Any, weight), compute_dtype=None)  # autocast overrules it
    return Projection(
        weight=matrix,
        bias=None if bias is None else bias.to(dtype),
        a=delta.a,
        b=delta.b,
        scale=delta.scale,
        rows=rows,
    )


def _pairs_of(module: AdaptedLinear) -> tuple[LinearDelta | None, LowRankRows | None]:
    """The record that acts on an adapted layer, where it is nothing but a low-rank pair, or nothing at all.

    In a mixed batch the record is empty, and beside it stand the pairs of all rows.
    """
    routing = module.adapter_state.routed()
    names = module.acting_here() if routing is None else [n for n in routing.adapters if module.holds(n)]
    copied = any(name in module.copies for name in (*names, *module.adapter_state.acting()))
    if (routing is None and len(names) > 1) or copied or "merged_weight" in vars(module):
        return None, None
    records = {name: _plain_record(module, name) for name in names}
    fitting = {name: record for name, record in records.items() if record is not None}
    if not names or len(fitting) < len(names):
        return None if names else LinearDelta(), None
    return (fitting[names[0]], None) if routing is None else (LinearDelta(), pairs_of_rows(fitting, routing))


def _plain_record(module: AdaptedLinear, name: str) -> LinearDelta | None:
    """The record of one adapter, where it is a low-rank pair alone and nothing is dropped in front of it.

    What lowering found is kept: it costs a pass over W for DoRA, and for plain LoRA more than a small layer's products.
    """
    config, kept = module.method(name), module.__dict__.setdefault("_fused_records", {})
    known = cast("_Known | None", kept.get(name))
    if module.training and config.dropout:
        return None
    if known is None or known.config is not config or not known.holds(module.adapters[name]):
        record = module.record(name)
        fits = record.rank > 0 and record.in_scale is None and record.out_scale is None and record.bias is None
        known = kept[name] = _Known(config, record if fits else None, _names_of_pair(module.adapters[name], record))
        return known.record
    return known.record if known.record is None or known.names else module.record(name)


@dataclass(frozen=True, slots=True)
class _Known:
    """What an adapter's record on a layer is as long as its config is this one; None: not a pair alone.

    ``names`` are those of the parameters that are the record's pair themselves; empty where it is computed from them.
    """

    config: LinearMethod
    record: LinearDelta | None
    names: tuple[str, ...]

    def holds(self, holder: nn.Module) -> bool:
        """Whether the pair is still the holder's."""
        if self.record is None or not self.names:
            return True
        a, b = (holder._parameters.get(name) for name in self.names)
        return a is self.record.a and b is self.record.b


def _names_of_pair(holder: nn.Module, record: LinearDelta) -> tuple[str, ...]:
    names = {id(parameter): name for name, parameter in holder._parameters.items()}
    found = tuple(names[id(factor)] for factor in (record.a, record.b) if id(factor) in names)
    return found if len(found) == 2 else ()
