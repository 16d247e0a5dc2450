"""Modules of a block in their current state: whether fused kernels can run them, and the kernels' arguments.

A module that is hooked or trained, or that computes in another dtype than the residual stream, runs its own code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.contract.keys import SUBLAYER
from veneer.model.adapted.linear import AdaptedLinear
from veneer.model.adapted.parameters import AdaptedParameters, acting_record
from veneer.model.blueprint.linears import is_linear
from veneer.model.blueprint.parts import Norm
from veneer.model.inplace import InPlace
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.sites.residual import ResidualAdapters
from veneer.model.sites.structure import SublayerKind
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from veneer.quant.dense import DenseWeight
from veneer.quant.product import CodedWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class ActingNorm:
    """Norm as the kernels' arguments: LayerNorm if it has a bias, otherwise RMSNorm. ``offset`` is added to the weight
    (Gemma: 1).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the statistics that `backward` reads: one or two numbers of each row."""
        if self.bias is None:
            return rms_norm_forward(x, self.weight, self.eps, self.offset)
        y, mean, rstd = layer_norm_forward(x, self.weight, self.bias, self.eps)
        return y, torch.stack([mean, rstd])

    def backward(self, dy: Tensor, x: Tensor, statistics: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the gradient with respect to x, plus ``added`` if given."""
        if self.bias is None:
            return rms_norm_backward(dy, x, self.weight, statistics, self.offset, added=added)[0]
        return layer_norm_backward(dy, x, self.weight, statistics[0], statistics[1], added=added)[0]


@dataclass(frozen=True, slots=True)
class Acting:
    """A block in its current state. The residual stream has the dtype ``stream``; other values have ``dtype``, which
    may be autocast's.

    Paths start at the block.
    """

    block: nn.Module
    stream: torch.dtype
    dtype: torch.dtype

    def module(self, path: str) -> nn.Module:
        """Return a module of the block by its path. If the path is empty, return the block."""
        return cast(nn.Module, attrgetter(path)(self.block)) if path else self.block

    def norm(self, norm: Norm) -> ActingNorm | None:
        """Return a norm as the kernels' arguments.

        Return None if the norm is trained or hooked, has another dtype than the residual stream, or has a weight for
        each head.
        """
        module = self.module(norm.path)
        if not is_plain(module) or isinstance(module, InPlace):  # reading a weight that rows have copies of raises
            return None
        own, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        held = [t for t in (own, bias) if t is not None]
        if len(norm.shape) != 1 or any(t.requires_grad or t.dtype != self.stream for t in held):
            return None
        weight: Tensor | None = own
        if weight is None:
            weight = torch.ones(norm.shape, dtype=self.stream, device=next(self.block.parameters()).device)
        if norm.kind == "rms":
            return ActingNorm(weight, None, norm.eps, norm.offset)
        weight = weight + norm.offset if norm.offset else weight
        return ActingNorm(weight, torch.zeros_like(weight) if bias is None else bias, norm.eps, 0.0)

    def layer(self, path: str) -> LinearLayer | None:
        """Return a frozen layer with its adapters' changes, without dropout masks, or None if the kernels cannot run
        it.

        They cannot if several adapters have dropout, if weights are trained or copied, or if there are hooks.
        """
        module = self.module(path)
        if not (is_linear(module) or _is_router(module)) or not is_plain(module):
            return None
        if isinstance(module, AdaptedParameters):
            return self._router(module)
        bias = cast("Tensor | None", module._parameters.get("bias"))
        weight = frozen_weight(module)
        if bias is not None and bias.requires_grad:
            return None
        matrix: Any = weight
        if isinstance(weight, DenseWeight):
            matrix = weight.tensor
            if matrix.requires_grad or matrix.dtype != self.dtype:
                return None
        elif isinstance(weight, CodedWeight) and torch.is_autocast_enabled(cast(Tensor, module.weight).device.type):
            matrix = replace(cast(Any, weight), compute_dtype=None)  # autocast overrules it
        plain = LinearLayer(weight=matrix, bias=None if bias is None else bias.to(self.dtype))
        if not isinstance(module, AdaptedLinear):
            return plain
        if module.replaces_weight() or module.drops_apart() or module.needs_shape():
            return None
        records, runs = module.acting_records()
        return replace(plain, records=records, runs=runs)

    def _router(self, module: AdaptedParameters) -> LinearLayer | None:
        """Return a router as a linear layer: its matrix, with the record of the adapters that change it.

        Return None if the matrix is trained, has copies or another dtype, or if the rows of a batch name their
        adapters.
        """
        matrix = module._parameters["weight"]
        if matrix is None or matrix.requires_grad or matrix.dtype != self.dtype:
            return None
        if module.copies or module.adapter_state.routed() is not None:
            return None
        record, bias = acting_record(module, "weight"), module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            return None
        records = () if record is None else (record,)
        return LinearLayer(weight=matrix, bias=None if bias is None else bias.to(self.dtype), records=records)

    def masked(self, path: str, layer: LinearLayer, x: Tensor) -> LinearLayer:
        """Return the layer with dropout masks on the inputs of its records, for the rows and positions of x."""
        module = self.module(path)
        masks = module.masks(x) if isinstance(module, AdaptedLinear) else ()
        return replace(layer, masks=masks) if masks else layer


def computed_in(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which linear layers compute: x's, or autocast's if x is float32.

    Return None if autocast is on, and x has neither autocast's dtype nor float32.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    asked = torch.get_autocast_dtype(x.device.type)
    return asked if x.dtype in (asked, torch.float32) else None


def is_plain(module: nn.Module) -> bool:
    """Return True if a call of the module runs its class's forward and, besides, at most hooks of bottleneck adapters.

    These hooks are allowed because the fused half that contains the module applies its `bottlenecks` itself.
    """
    hooks = (hook for kind in HOOKS for hook in getattr(module, kind).values())
    return "forward" not in vars(module) and all(isinstance(_owner(hook), ResidualAdapters) for hook in hooks)


def bottlenecks(block: nn.Module, kind: SublayerKind) -> ResidualAdapters | None:
    """Return the module that holds the bottlenecks now active after a sub-layer of a block, or None if
    there are none.
    """
    holder = getattr(block, f"{SUBLAYER}{kind}", None)
    return holder if isinstance(holder, ResidualAdapters) and holder.acting_on_rows() else None


def _is_router(module: nn.Module) -> bool:
    """Return True if a module's parameters are a matrix, by which it multiplies its input to compute scores, and
    perhaps a bias.
    """
    matrix = module._parameters.get("weight")
    plain = not isinstance(module, InPlace) or isinstance(module, AdaptedParameters)
    known = module._parameters.keys() <= {"weight", "bias"}
    return plain and known and matrix is not None and matrix.ndim == 2


def _owner(method: object) -> object:
    return getattr(method, "__self__", None)
