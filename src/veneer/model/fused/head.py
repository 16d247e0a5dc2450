"""Forward pass without the output head, so that the loss is computed from hidden states, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.model.blueprint import decoder as blueprint
from veneer.model.coded.frozen_weight import frozen_weight
from veneer.model.coded.quant_linear import QuantLinear
from veneer.model.fused.parts import is_plain
from veneer.model.inplace import InPlace, change_class, restore_class
from veneer.quant.dense import DenseWeight
from veneer.records.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class FrozenHead:
    """Frozen head without an adapter: the layer's weight as W (v, d), and its bias."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None


@dataclass(slots=True)
class Passed:
    """Dtype in which the head would have computed, known once it was skipped: its weight's, or autocast's."""

    dtype: torch.dtype | None = None


class _Passing(InPlace, nn.Module):
    """Mixin in front of the head's class for one forward pass: hidden states come out where logits would."""

    passed: Passed

    def forward(self, hidden: Tensor) -> Tensor:
        weight, device = cast(Tensor, self.weight), hidden.device.type
        own = weight.dtype if weight.is_floating_point() else hidden.dtype
        self.passed.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
        return hidden


def head_of(model: nn.Module) -> FrozenHead | None:
    """Return the head of a model whose logits are exactly its output.

    None if it is adapted, trained or hooked, or if it computes more.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) not in (nn.Linear, QuantLinear) or not is_plain(cast(nn.Module, head)):
        return None
    module = cast(Any, head)
    weight, bias = frozen_weight(module), module.bias
    if any(t is not None and t.requires_grad for t in (bias, getattr(weight, "tensor", None))):
        return None
    return FrozenHead(weight.tensor if isinstance(weight, DenseWeight) else weight, bias)


def is_plain_head(head: blueprint.Head | None) -> bool:
    """Return True if the description of a head has no cap and no scale."""
    return head is not None and head.softcap is None and head.scale == 1


@contextmanager
def hidden_as_logits(model: nn.Module) -> Iterator[Passed]:
    """Context in which ``logits`` of the model's output are the hidden states before its head."""
    head = cast(PreTrainedModel, model).get_output_embeddings()
    change_class(head, _Passing)
    passed = cast(_Passing, head).__dict__["passed"] = Passed()
    try:
        yield passed
    finally:
        restore_class(head)
        del cast(_Passing, head).__dict__["passed"]


@torch.no_grad()
def ends_with_head(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return True if the logits are the output of the head and nothing else: no cap, no scale."""
    if head_of(model) is None:
        return False
    kept: list[Tensor] = []
    with hidden_as_logits(model):
        hook = cast(nn.Module, model.get_output_embeddings()).register_forward_hook(lambda m, a, y: kept.append(y))
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
    return len(kept) == 1 and kept[0].shape == logits.shape and bool((kept[0] == logits).all())
