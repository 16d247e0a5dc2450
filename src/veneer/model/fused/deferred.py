"""Logits that have not been read yet: hidden states before a frozen head, and the operations that follow it.

A model's forward pass computes logits, scales or caps them, and computes the loss of labels. With `DeferredLogits` the
same code runs without logits. Scales, casts, caps and slices of positions are recorded, and the cross-entropy of labels
is computed in chunks. Any other use computes the logits, as the head would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from veneer.errors import CompositionError
from veneer.ops.cross_entropy import HeadOptions, linear_cross_entropy, linear_cross_entropy_rows
from veneer.records.frozen import FrozenWeight

Made = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FrozenHead:
    """Frozen head without an adapter: the layer's weight as W (v, d), and its bias."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Pending:
    """Recorded computation from hidden states to logits.

    ``project`` computes the head's product y, in the dtype ``computed``. ``after`` holds the elementwise operations
    that follow; the last result has ``dtype``. As one formula, they are ``outer * tanh(inner * y)`` if ``capped``,
    otherwise ``inner * y``.
    """

    head: FrozenHead
    project: Made
    computed: torch.dtype
    dtype: torch.dtype
    after: tuple[Made, ...] = ()
    inner: float = 1.0
    outer: float = 1.0
    capped: bool = False

    @property
    def n_classes(self) -> int:
        """Number of classes of the head."""
        return self.head.weight.shape[0]

    def made(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states."""
        logits = self.project(hidden)
        for step in self.after:
            logits = step(logits)
        return logits

    def options(self, **settings: Any) -> HeadOptions:
        """Return the options for computing a loss from hidden states in chunks."""
        scale = self.inner * self.outer
        scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-12) else scale  # 1/c · c is 1 but for rounding
        return HeadOptions(scale=scale, softcap=self.outer if self.capped else None, **settings)


class DeferredLogits(Tensor):
    """Logits (…, v) that are computed when they are read; until then the hidden states (…, d) before the head.

    To autograd they are the hidden states: gradients and hooks pass through.
    """

    held: Tensor
    pending: Pending
    kept: Tensor | None

    @staticmethod
    def __new__(cls, held: Tensor, pending: Pending) -> DeferredLogits:
        own: Any = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        own.held, own.pending, own.kept = held, pending, None
        return own  # type: ignore[no-any-return]

    @staticmethod
    def of(hidden: Float[Tensor, "*n d"], pending: Pending) -> DeferredLogits:
        """Return the logits of hidden states without computing them."""
        return cast(DeferredLogits, _Wrapped.apply(hidden, pending))  # type: ignore[no-untyped-call]

    @property
    def hidden(self) -> Float[Tensor, "*n d"]:
        """Hidden states before the head, with their gradient."""
        return cast(Tensor, _Unwrapped.apply(self))  # type: ignore[no-untyped-call]

    def operands(self, **settings: Any) -> tuple[Tensor, Tensor | FrozenWeight, Tensor | None, HeadOptions]:
        """Return hidden states (n, d), weight, bias and options of `linear_cross_entropy`, in the head's dtype."""
        pending = self.pending
        head, hidden = pending.head, self.hidden
        weight = head.weight.to(pending.computed) if isinstance(head.weight, Tensor) else head.weight
        bias = None if head.bias is None else head.bias.to(pending.computed)
        return hidden.reshape(-1, hidden.shape[-1]).to(pending.computed), weight, bias, pending.options(**settings)

    def made(self) -> Tensor:
        """Return the computed logits, with their autograd graph.

        They are kept, so that later reads return the same tensor, and so that it can be written to.
        """
        learns = _learns(self) and not torch.is_inference_mode_enabled()
        if self.kept is None or (learns and not self.kept.requires_grad):
            with torch.set_grad_enabled(learns):
                self.kept = self.pending.made(self.hidden)
        return self.kept

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ITS_OWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        noted = _NOTED.get(func)
        by_place = not kwargs or func in _NAMED
        if noted is not None and by_place and args and isinstance(args[0], cls) and args[0].kept is None:
            found = noted(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(cls, cls.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled() and any(_learns(each) for each in tree_leaves((args, kwargs)) if type(each) is cls):
            raise CompositionError(
                f"{func} reads logits that need a gradient and have not been computed yet, which torch.func does not "
                "allow. Pass a plain tensor: `logits + 0`"
            )
        args, kwargs = tree_map_only(cls, cls.made, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Wrapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, pending: Pending) -> Tensor:
        return DeferredLogits(hidden.detach(), pending)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Unwrapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        return logits.held.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _learns(logits: DeferredLogits) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.requires_grad


def _shape(func: Any, logits: DeferredLogits) -> torch.Size:
    return torch.Size((*logits.held.shape[:-1], logits.pending.n_classes))


def _size(func: Any, logits: DeferredLogits, dim: int | None = None) -> Any:
    shape = _shape(func, logits)
    return shape if dim is None else shape[dim]


def _numel(func: Any, logits: DeferredLogits) -> int:
    return math.prod(_shape(func, logits))


def _dtype(func: Any, logits: DeferredLogits) -> torch.dtype:
    return logits.pending.dtype


def _then(logits: DeferredLogits, step: Made, **changes: Any) -> DeferredLogits:
    pending = logits.pending
    return DeferredLogits.of(logits.hidden, replace(pending, after=(*pending.after, step), **changes))


def _scaled(func: Any, logits: DeferredLogits, factor: Any) -> Any:
    if type(factor) not in (int, float) or factor == 0:
        return NotImplemented
    by = 1 / factor if func in _DIVIDES else factor
    which = "outer" if logits.pending.capped else "inner"
    return _then(logits, lambda x: func(x, factor), **{which: getattr(logits.pending, which) * by})


def _capped(func: Any, logits: DeferredLogits) -> Any:
    return NotImplemented if logits.pending.capped else _then(logits, func, capped=True)


def _float(func: Any, logits: DeferredLogits) -> DeferredLogits:
    return _then(logits, func, dtype=torch.float32)


def _to(func: Any, logits: DeferredLogits, *args: Any) -> Any:
    dtypes = [each for each in args if isinstance(each, torch.dtype)]
    places = [each for each in args if isinstance(each, torch.device | str | int) and not isinstance(each, bool)]
    known = len(dtypes) + len(places) == len(args)
    if not known or any(torch.device(place) != logits.held.device for place in places):
        return NotImplemented
    return _then(logits, lambda x: func(x, *dtypes), dtype=dtypes[0]) if dtypes else logits


def _same(func: Any, logits: DeferredLogits) -> DeferredLogits:
    return DeferredLogits.of(func(logits.hidden), logits.pending)


def _at(func: Any, logits: DeferredLogits, key: Any) -> Any:
    """Return deferred logits of the positions that a key selects, by applying the key to the hidden states. Return
    NotImplemented if the key also selects among classes.
    """
    keys = key if isinstance(key, tuple) else (key,)
    own = [each for each in keys if each is not None and each is not ...]
    n_axes = sum(each.ndim if isinstance(each, Tensor) and each.dtype == torch.bool else 1 for each in own)
    is_open = any(each is ... for each in keys)  # then the last keys are those of the last axes
    reaches = n_axes >= logits.held.ndim or (is_open and keys[-1] is not ...)
    last_is_whole = isinstance(keys[-1], slice) and keys[-1] == slice(None) if keys else False
    if reaches and not (last_is_whole and n_axes <= logits.held.ndim):
        return NotImplemented
    return DeferredLogits.of(logits.hidden[key], logits.pending)


def _viewed(func: Any, logits: DeferredLogits, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | torch.dtype) else shape
    if not sizes or sizes[-1] != logits.pending.n_classes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    hidden = logits.hidden
    return DeferredLogits.of(hidden.reshape(*sizes[:-1], hidden.shape[-1]), logits.pending)


def _flattened(func: Any, logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    ndim = logits.held.ndim
    if end_dim % ndim == ndim - 1:
        return NotImplemented
    return DeferredLogits.of(logits.hidden.flatten(start_dim, end_dim), logits.pending)


def _cross_entropy(
    func: Any,
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    of_classes = target.ndim == 1 and target.dtype == torch.long and logits.held.ndim == 2
    capless = logits.pending.capped and logits.pending.outer <= 0
    known = reduction in ("none", "sum", "mean") and not label_smoothing
    if not of_classes or capless or not known or any(each is not None for each in (weight, size_average, reduce)):
        return NotImplemented
    hidden, matrix, bias, options = logits.operands(ignore_index=ignore_index)
    matrix = matrix.detach() if isinstance(matrix, Tensor) else matrix
    if reduction == "none":
        loss = linear_cross_entropy_rows(hidden, matrix, target, bias, options)[0]
    else:
        options = replace(options, num_items=1.0 if reduction == "sum" else None)
        loss = linear_cross_entropy(hidden, matrix, target, bias, options)
    in_float32 = torch.is_autocast_enabled(logits.held.device.type)  # as autocast computes losses
    return loss.float() if in_float32 else loss.to(logits.pending.dtype)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ITS_OWN = {
    *map(_getter, ("device", "requires_grad", "grad_fn", "is_leaf", "layout", "is_cuda", "is_meta", "ndim")),
    Tensor.register_hook, Tensor.dim, Tensor.ndimension, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
    Tensor.__len__, torch.is_floating_point, torch.is_complex,
}  # fmt: skip
"""Questions about logits that the hidden states answer alike."""
_DIVIDES = {Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide, torch.true_divide}
_NOTED: dict[Any, Any] = {
    _getter("shape"): _shape,
    Tensor.size: _size,
    Tensor.numel: _numel,
    _getter("dtype"): _dtype,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, *_DIVIDES), _scaled),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _capped),
    Tensor.float: _float,
    Tensor.to: _to,
    **dict.fromkeys((Tensor.clone, torch.clone, Tensor.contiguous, Tensor.detach, torch.detach), _same),
    Tensor.__getitem__: _at,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _viewed),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flattened),
    torch.nn.functional.cross_entropy: _cross_entropy,
}
"""Operations that logits take without being made."""
_NAMED = {Tensor.size, Tensor.flatten, torch.flatten, torch.nn.functional.cross_entropy}
"""Of these, the functions whose arguments may be given by name."""
