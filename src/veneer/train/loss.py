"""The loss of next-token prediction over the trained tokens of a batch, and what is counted on the way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veneer.model.fused.decoder import fused_head
from veneer.model.fused.head import Head, hidden_as_logits
from veneer.ops.cross_entropy import HeadOptions, linear_cross_entropy_and_hits
from veneer.train.encode import IGNORED


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the trained tokens of one batch; ``total`` is differentiable, in nats."""

    total: Float[Tensor, ""]
    n_tokens: Int[Tensor, ""]
    n_right: Int[Tensor, ""]
    aux: Float[Tensor, ""] | None


def token_loss(
    model: nn.Module, inputs: dict[str, Any], *, label_smoothing: float = 0.0, weigh_by_probability: bool = False
) -> TokenLoss:
    """The summed cross-entropy in float32 of ``inputs["labels"]``, shifted by one.

    Only hidden states that predict a trained token go through the output head, where the model can be told so.
    ``weigh_by_probability`` is dynamic fine-tuning: each token's loss times its own probability, held constant
    (Wu et al. 2025, arXiv:2508.05629, eq. 9).
    """
    labels: Tensor = inputs["labels"][:, 1:]
    head = None if label_smoothing or weigh_by_probability or model_of(model) is not model else fused_head(model)
    if head is not None:
        return _loss_in_chunks(model, head, inputs)
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    if _keeps_logits(cast(Hashable, type(model_of(model)))):
        logits = model(**inputs, logits_to_keep=kept, use_cache=False)
    else:
        logits = model(**inputs, use_cache=False)
        logits.logits = logits.logits[:, kept]
    aux = getattr(logits, "aux_loss", None)
    scores, targets = logits.logits.flatten(0, 1), labels[:, kept].to(logits.logits.device).flatten()
    trained = targets != IGNORED
    each = nn.functional.cross_entropy(
        scores.float(), targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    if weigh_by_probability:
        each = each * torch.exp(-each.detach())
    n_right = (scores.detach().argmax(dim=-1) == targets).logical_and(trained).sum()
    return TokenLoss(each.sum(), trained.sum(), n_right, aux)


def _loss_in_chunks(model: nn.Module, head: Head, inputs: dict[str, Any]) -> TokenLoss:
    """The same loss of a fused model, without the logits of all tokens in memory."""
    labels: Tensor = inputs["labels"][:, 1:].flatten()
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    with hidden_as_logits(model):
        out = model(**rest, use_cache=False)
    hidden = out.logits[:, :-1].flatten(0, 1)
    dtype = head.weight.dtype if isinstance(head.weight, Tensor) else hidden.dtype
    total, hits = linear_cross_entropy_and_hits(
        hidden.to(dtype), head.weight, labels.to(hidden.device), head.bias, HeadOptions(num_items=1.0)
    )
    return TokenLoss(total, (labels != IGNORED).sum(), hits, getattr(out, "aux_loss", None))


def model_of(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@functools.cache
def _keeps_logits(cls: Hashable) -> bool:
    return "logits_to_keep" in inspect.signature(cast("type[nn.Module]", cls).forward).parameters
