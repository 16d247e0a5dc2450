"""Formula of a PromptDelta: virtual tokens in front of the embedded input."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

UNTRAINED = -100  # a label of nothing


def replace_leading(
    tokens: Float[Tensor, "*rows n d"], embedded: Float[Tensor, "rows length d"]
) -> Float[Tensor, "rows length d"]:
    """Return ``embedded`` with its first n positions replaced by virtual tokens: one set for all rows, or one each."""
    rows = tokens.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
    return torch.cat([rows, embedded[:, tokens.shape[-2] :]], dim=1)


def weighed_loss(
    logits: Float[Tensor, "rows length v"], labels: Int[Tensor, "rows length"], weights: Float[Tensor, "rows length"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the labels times their weights, summed and divided by the number of labels, in
    float32.

    Labels of -100 do not count. ``labels`` and ``weights`` are not shifted: the logits at a position predict the label
    at the next one.
    """
    targets = labels[:, 1:].to(logits.device)
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().mT, targets, ignore_index=UNTRAINED, reduction="none"
    )
    return (each * weights[:, 1:].to(each)).sum() / (targets != UNTRAINED).sum()


def with_leading(x: Shaped[Tensor, "rows length"], n: int, value: float) -> Shaped[Tensor, "rows n_plus_length"]:
    """Return ``x`` with n columns of one value in front."""
    return torch.cat([x.new_full((x.shape[0], n), value), x], dim=1)
