"""Forward pass whose head defers its logits, so that losses are computed from hidden states, chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.model.cut_weight import is_part
from veneer.model.fused.deferred import DeferredLogits, FrozenHead, Pending
from veneer.model.inplace import InPlace, base_of, change_class, restore_class
from veneer.model.program.acting import is_plain
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.quant.dense import DenseWeight


class _Deferring(InPlace, nn.Module):
    """Mixin for a head's class during one forward pass. Its forward computes no logits: it returns the hidden states
    with all that is needed to compute them later.
    """

    frozen_head: FrozenHead

    def forward(self, hidden: Tensor) -> Tensor:
        weight, device = cast(Tensor, self.weight), hidden.device.type
        computed = weight.dtype if weight.is_floating_point() else hidden.dtype
        autocast = torch.is_autocast_enabled(device)
        computed = torch.get_autocast_dtype(device) if autocast else computed
        project = functools.partial(_project, self, base_of(type(self)), torch.autocast(device, computed, autocast))
        return DeferredLogits.of(hidden, Pending(self.frozen_head, project, computed, computed))


def _project(module: nn.Module, cls: Any, autocast: torch.autocast, hidden: Tensor) -> Tensor:
    """Compute logits by the head's own class, under the autocast settings of the forward pass that deferred them."""
    with autocast:
        return cast(Tensor, cls.forward(module, hidden))


def head_of(model: nn.Module) -> FrozenHead | None:
    """Return the head of a model, or None if it is adapted, trained, sharded over processes, or hooked."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) not in (nn.Linear, QuantLinear) or not is_plain(cast(nn.Module, head)):
        return None
    module = cast(Any, head)
    weight, bias = frozen_weight(module), module.bias
    if any(t is not None and (t.requires_grad or is_part(t)) for t in (bias, getattr(weight, "tensor", None))):
        return None
    return FrozenHead(weight.tensor if isinstance(weight, DenseWeight) else weight, bias)


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[bool]:
    """Enter a context in which a model with a frozen head returns `DeferredLogits`. The context yields True if the head
    is frozen; otherwise it changes nothing.
    """
    head = head_of(model)
    if head is None:
        yield False
        return
    module = cast(PreTrainedModel, model).get_output_embeddings()
    change_class(module, _Deferring)
    vars(module)["frozen_head"] = head
    try:
        yield True
    finally:
        restore_class(module)
        del vars(module)["frozen_head"]


def defers_logits(model: nn.Module) -> bool:
    """Return True if a model is in the context of `deferred_logits`, and its head is frozen."""
    return isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), _Deferring)
