"""Selective activation checkpointing: expensive results are kept, cheap ones are computed again.

Full checkpointing (Chen et al. 2016, arXiv 1604.06174) keeps the input of each block and computes the whole block again
in the backward pass. Here the block keeps attention's output and its large matrix products. Norms, activations,
rotation, masks of dropout, casts and low-rank products are computed again. The idea is that of Korthikanti et al. 2022
(arXiv 2205.05198, section 5): recompute the parts that take much memory and little arithmetic. Fused blocks compute
most of these again anyway. They also compute the projections of the normed stream again, and keep attention's output
and the stream before either half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from veneer.ops.product import NAMESPACE

DEAR = 256
"""Multiply-adds for each number that a product gives, above which it is kept: a projection costs as many as the stream
is wide, the second half of a LoRA pair its rank, attention scores the head's width."""

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def checkpoint_selectively(model: nn.Module, every_n_layers: int = 1) -> None:
    """Enable selective gradient checkpointing for a transformers model.

    The model's own `gradient_checkpointing_disable` ends it. Of every ``every_n_layers`` blocks one is checkpointed;
    the others keep everything.
    """
    settings = {"use_reentrant": False, "context_fn": selective_contexts}
    if every_n_layers == 1:
        _switch(model)(settings)
    else:  # a newer argument
        _switch(model)(settings, every_n_layers=every_n_layers)


def checkpoint_fully(model: nn.Module) -> None:
    """Enable full gradient checkpointing, not reentrant, for a transformers model: whole blocks are computed again."""
    _switch(model)({"use_reentrant": False})


def _switch(model: nn.Module) -> Callable[..., None]:
    """Return the model's method that enables checkpointing; transformers renames it in version 6."""
    own: Any = model
    found: Callable[..., None] = (
        getattr(own, "activation_checkpointing_enable", None) or own.gradient_checkpointing_enable
    )
    return found


def selective_contexts() -> Any:
    """Return the ``context_fn`` of `torch.utils.checkpoint.checkpoint` for the selective form."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def is_selective(block: nn.Module) -> bool:
    """Return True if a block is now checkpointed selectively."""
    if not (vars(block).get("gradient_checkpointing") and block.training and torch.is_grad_enabled()):
        return False
    function: Any = getattr(block, "_gradient_checkpointing_func", None)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if isinstance(function, partial):
        return function.keywords.get("context_fn") is selective_contexts
    # Decided anew for each pass (`model.fused.activation_memory`).
    return bool(getattr(function, "is_selective", False))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = _is_attention(op, args, kwargs)
    place = 0 if op.namespace == NAMESPACE else _PRODUCTS.get(op)
    if place is not None:
        factor: Tensor = args[place]
        dear = factor.shape[-1] > DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if an operation is attention without dropout. Attention with dropout is not kept, because its random
    numbers would have to be kept too.
    """
    if op.name().removeprefix("aten::") not in _ATTENTION:
        return False
    names = [argument.name for argument in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return not given.get("dropout_p")
