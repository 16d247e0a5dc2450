"""Reading of a norm or a linear layer of a model for a fused block: the kernels' arguments, or None if it
is special.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.contract.keys import SUBLAYER
from veneer.model.adapted.linear import AdaptedLinear
from veneer.model.blueprint import parts as blueprint
from veneer.model.blueprint.linears import is_linear
from veneer.model.coded.frozen_weight import frozen_weight
from veneer.model.inplace import InPlace
from veneer.model.placed.residual import ResidualAdapters
from veneer.model.placed.structure import SublayerKind
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from veneer.quant.dense import DenseWeight
from veneer.quant.product import CodedWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """RMSNorm of the model: weight, epsilon, and the summand of the weight (Gemma: 1)."""

    weight: Tensor
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the statistics that `backward` reads."""
        return rms_norm_forward(x, self.weight, self.eps, self.offset)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        """Return the gradient in x."""
        return rms_norm_backward(dy, x, self.weight, rstd, self.offset)[0]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """LayerNorm of the model: weight, bias, epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and mean and reciprocal deviation of each row, (2, n), that `backward` reads."""
        y, mean, rstd = layer_norm_forward(x, self.weight, self.bias, self.eps)
        return y, torch.stack([mean, rstd])

    def backward(self, dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
        """Return the gradient in x."""
        return layer_norm_backward(dy, x, self.weight, statistics[0], statistics[1])[0]


@dataclass(frozen=True, slots=True)
class NoNorm:
    """Absence of a norm in front of a half."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x itself, and no statistics."""
        return x, x.new_empty(0)

    def backward(self, dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
        """Return the gradient in x: dy."""
        return dy


Norm = RmsNorm | LayerNorm | NoNorm


def computed_in(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which linear layers compute: x's, or that of autocast for a float32 x.

    None if autocast asks for another.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    asked = torch.get_autocast_dtype(x.device.type)
    return asked if x.dtype in (asked, torch.float32) else None


def add_onto(stream: Tensor, change: Tensor) -> Tensor:
    """Return the sum of stream and change in the stream's dtype. If ``change`` has that dtype, it is overwritten."""
    return change.add_(stream) if change.dtype == stream.dtype else stream + change


def times(change: Tensor, multiplier: float) -> Tensor:
    """Return ``change`` times a number, in its own memory."""
    return change if multiplier == 1 else change.mul_(multiplier)


def scaled(gradient: Tensor, multiplier: float) -> Tensor:
    """Return a gradient times a number; it is not written over."""
    return gradient if multiplier == 1 else gradient * multiplier


def as_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """Return ``x``, which nobody else reads, in another shape.

    It is not a view: FSDP2 puts hooks on a block's output, which views may lose.
    """
    found: Tensor = torch.ops.aten._unsafe_view.default(x, shape)
    return found


def parted(tensors: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Return tensors that were kept one after another, each part as a tuple. The last is the rest."""
    ends = list(accumulate(sizes, initial=0))
    parts = [tuple(tensors[start:end]) for start, end in itertools.pairwise(ends)]
    return [*parts, tuple(tensors[ends[-1] :])]


def is_plain(module: nn.Module) -> bool:
    """Return True if calling the module does nothing but run its class's forward, and a bottleneck's hooks.

    Those hooks are allowed, since a half calls its `bottlenecks` itself.
    """
    hooks = (hook for kind in HOOKS for hook in getattr(module, kind).values())
    return "forward" not in vars(module) and all(isinstance(_owner(hook), ResidualAdapters) for hook in hooks)


def bottlenecks(block: nn.Module, kind: SublayerKind) -> ResidualAdapters | None:
    """Return the holder of the bottlenecks that act after a sub-layer of a block now; None if there are none."""
    holder = getattr(block, f"{SUBLAYER}{kind}", None)
    return holder if isinstance(holder, ResidualAdapters) and holder.acting else None


def _owner(method: object) -> object:
    return getattr(method, "__self__", None)


def norm_of(owner: nn.Module, norm: blueprint.Norm | None, dtype: torch.dtype) -> Norm | None:
    """Return a norm of ``owner`` as the kernels' arguments; `NoNorm` if there is none.

    None if it is trained, hooked, kept in another dtype than x, or has a weight for each head.
    """
    if norm is None:
        return NoNorm()
    module = cast(nn.Module, getattr(owner, norm.path))
    if not is_plain(module) or isinstance(module, InPlace):  # reading a weight that rows have copies of raises
        return None
    own, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if len(norm.shape) != 1 or any(t is not None and (t.requires_grad or t.dtype != dtype) for t in (own, bias)):
        return None
    weight: Tensor | None = own
    if weight is None:
        weight = torch.ones(norm.shape, dtype=dtype, device=next(owner.parameters()).device)
    if norm.kind == "rms":
        return RmsNorm(weight, norm.eps, norm.offset)
    weight = weight + norm.offset if norm.offset else weight
    return LayerNorm(weight, torch.zeros_like(weight) if bias is None else bias, norm.eps)


def layer_of(module: nn.Module, dtype: torch.dtype) -> LinearLayer | None:
    """Return a frozen layer to compute in ``dtype``, with the records of its rows; None if it does more.

    More means adapters in a sum with dropout, trained or copied weights, hooks. Masks are drawn when it runs
    (`with_masks`).
    """
    if not is_linear(module) or not is_plain(module):
        return None
    bias = cast("Tensor | None", module._parameters.get("bias"))
    weight = frozen_weight(module)
    if bias is not None and bias.requires_grad:
        return None
    matrix: Any = weight
    if isinstance(weight, DenseWeight):
        matrix = weight.tensor
        if matrix.requires_grad or matrix.dtype != dtype:
            return None
    elif isinstance(weight, CodedWeight) and torch.is_autocast_enabled(cast(Tensor, module.weight).device.type):
        matrix = replace(cast(Any, weight), compute_dtype=None)  # autocast overrules it
    plain = LinearLayer(weight=matrix, bias=None if bias is None else bias.to(dtype))
    if not isinstance(module, AdaptedLinear):
        return plain
    if module.replaces_weight() or module.drops_apart() or module.needs_shape():
        return None
    records, runs = module.acting_records()
    return replace(plain, records=records, runs=runs)


def with_masks(module: nn.Module, layer: LinearLayer, x: Tensor) -> LinearLayer:
    """Return the layer with the dropout masks of its records' inputs, which have the rows and positions of x."""
    masks = module.masks(x) if isinstance(module, AdaptedLinear) else ()
    return replace(layer, masks=masks) if masks else layer
