"""Loss of next-token prediction over the trained tokens of a batch, and their counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veneer.adapters.token_scores import NextTokens, kept_logits, next_tokens
from veneer.data.encoding import IGNORED
from veneer.model.fused.deferred import DeferredLogits
from veneer.ops.cross_entropy import linear_cross_entropy_and_hits, linear_cross_entropy_rows


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the trained tokens of one batch. ``total``, in nats, is differentiable; ``n_right`` counts right
    predictions. ``aux`` is the auxiliary loss of a router, or None.
    """

    total: Float[Tensor, ""]
    n_tokens: Int[Tensor, ""]
    n_right: Int[Tensor, ""]
    aux: Float[Tensor, ""] | None


def token_loss(
    model: nn.Module, inputs: dict[str, Any], *, label_smoothing: float = 0.0, weigh_by_probability: bool = False
) -> TokenLoss:
    """Return the summed cross-entropy in float32 of ``inputs["labels"]``, shifted by one.

    Only hidden states that predict a trained token go through the output head, chunk by chunk if the head is frozen.
    ``weigh_by_probability`` is dynamic fine-tuning: each token's loss is multiplied by the token's own probability,
    held constant (Wu et al. 2025, arXiv:2508.05629, eq. 9).
    """
    labels: Tensor = inputs["labels"][:, 1:]
    scoring = Scoring(label_smoothing, weigh_by_probability)
    found = next_tokens(model, inputs) if scoring == Scoring() else None
    if found is not None:
        return _loss_in_chunks(found)
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    logits, aux = kept_logits(model, inputs, kept)
    return _scored(logits, labels[:, kept], scoring, aux)


def model_loss(model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
    """Return the model's own loss, times the number of labels. It is for an adapter that defines a loss of its own."""
    out = model(**inputs, use_cache=False)
    labels = inputs["labels"][:, 1:].to(out.logits.device)
    trained = labels != IGNORED
    predicting = out.logits[:, -labels.shape[1] - 1 : -1]  # virtual positions in front may be kept
    n_right = (predicting.detach().argmax(dim=-1) == labels).logical_and(trained).sum()
    return TokenLoss(out.loss * trained.sum(), trained.sum(), n_right, getattr(out, "aux_loss", None))


@dataclass(frozen=True, slots=True)
class Scoring:
    """Settings of a loss. Both are arguments of `token_loss`."""

    label_smoothing: float = 0.0
    weigh_by_probability: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """One run's share of a batch that several runs share: its rows, their first ``width`` columns, and its loss
    settings.
    """

    rows: slice
    width: int
    scoring: Scoring = Scoring()


def token_losses(model: nn.Module, inputs: dict[str, Any], shares: Sequence[Share]) -> list[TokenLoss]:
    """Compute `token_loss` for each share of a batch, in one pass over the model."""
    labels: Tensor = inputs["labels"][:, 1:]
    found = next_tokens(model, inputs) if all(share.scoring == Scoring() for share in shares) else None
    if found is not None:
        return _row_losses_in_chunks(found, labels.shape, shares)
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    logits, _ = kept_logits(model, inputs, kept)
    losses = []
    for share in shares:
        own = (labels[share.rows] != IGNORED).any(dim=0)[kept]
        part = logits[share.rows][:, own.to(logits.device)]
        losses.append(_scored(part, labels[share.rows][:, kept[own]], share.scoring, None))
    return losses


def _scored(logits: Tensor, labels: Tensor, scoring: Scoring, aux: Tensor | None) -> TokenLoss:
    scores, targets = logits.flatten(0, 1), labels.to(logits.device).flatten()
    trained = targets != IGNORED
    each = nn.functional.cross_entropy(
        scores.float(), targets, ignore_index=IGNORED, reduction="none", label_smoothing=scoring.label_smoothing
    )
    if scoring.weigh_by_probability:
        plain = nn.functional.cross_entropy(scores.detach().float(), targets, ignore_index=IGNORED, reduction="none")
        each = each * torch.exp(-plain)
    n_right = (scores.detach().argmax(dim=-1) == targets).logical_and(trained).sum()
    return TokenLoss(each.sum(), trained.sum(), n_right, aux)


def _loss_in_chunks(found: NextTokens) -> TokenLoss:
    if not isinstance(found.logits, DeferredLogits):
        return _scored(found.logits[None], found.labels, Scoring(), found.aux)
    hidden, weight, bias, options = found.logits.operands(num_items=1.0)
    total, hits = linear_cross_entropy_and_hits(hidden, weight, found.labels, bias, options)
    return TokenLoss(total, (found.labels != IGNORED).sum(), hits, found.aux)


def _row_losses_in_chunks(found: NextTokens, shape: Sequence[int], shares: Sequence[Share]) -> list[TokenLoss]:
    labels = found.labels.view(*shape)
    if not isinstance(found.logits, DeferredLogits):
        logits = found.logits.view(*shape, -1)
        return [_scored(logits[share.rows], labels[share.rows], Scoring(), None) for share in shares]
    hidden, weight, bias, options = found.logits.operands()
    losses, hits = linear_cross_entropy_rows(hidden, weight, found.labels, bias, options)
    losses, hits, trained = losses.view(*shape), hits.view(*shape), labels != IGNORED
    return [TokenLoss(losses[s.rows].sum(), trained[s.rows].sum(), hits[s.rows].sum(), None) for s in shares]
