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
