"""Loss of next-token prediction over the trained tokens of a batch, and their counts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from veneer.data.encoding import IGNORED
from veneer.model.fused.decoder import fused_head
from veneer.model.fused.head import FrozenHead, hidden_as_logits
from veneer.ops.cross_entropy import HeadOptions, linear_cross_entropy_and_hits, linear_cross_entropy_rows


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
    """Return the summed cross-entropy in float32 of ``inputs["labels"]``, shifted by one.

    Only hidden states that predict a trained token go through the output head, if the model supports it.
    ``weigh_by_probability`` is dynamic fine-tuning: each token's loss times its own probability, held constant (Wu et
    al. 2025, arXiv:2508.05629, eq. 9).
    """
    labels: Tensor = inputs["labels"][:, 1:]
    head = None if label_smoothing or weigh_by_probability else head_of_fused(model)
    if head is not None:
        return _loss_in_chunks(model, head, inputs)
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    logits, aux = kept_logits(model, inputs, kept)
    return _scored(logits, labels[:, kept], Scoring(label_smoothing, weigh_by_probability), aux)


def has_own_loss(model: nn.Module) -> bool:
    """Return True if an adapter that acts has a loss of its own, see `MethodConfig.has_own_loss`."""
    state = getattr(model, "adapter_state", None)
    return state is not None and any(state.configs[name].has_own_loss for name in state.acting())


def model_loss(model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
    """Return the loss that the model itself gives labels, times their number: of an adapter with a loss of its own."""
    out = model(**inputs, use_cache=False)
    labels = inputs["labels"][:, 1:].to(out.logits.device)
    trained = labels != IGNORED
    predicting = out.logits[:, -labels.shape[1] - 1 : -1]  # virtual positions in front may be kept
    n_right = (predicting.detach().argmax(dim=-1) == labels).logical_and(trained).sum()
    return TokenLoss(out.loss * trained.sum(), trained.sum(), n_right, getattr(out, "aux_loss", None))


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scoring of tokens; the two settings are those of `token_loss`."""

    label_smoothing: float = 0.0
    weigh_by_probability: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Share of one member in a mixed batch: its rows, their first ``width`` columns, and its scoring."""

    rows: slice
    width: int
    scoring: Scoring = Scoring()


def token_losses(model: nn.Module, inputs: dict[str, Any], shares: Sequence[Share]) -> list[TokenLoss]:
    """Return `token_loss` of every share of one batch, from one pass."""
    labels: Tensor = inputs["labels"][:, 1:]
    head = None if any(share.scoring != Scoring() for share in shares) else fused_head(model)
    if head is not None:
        return _row_losses_in_chunks(model, head, inputs, shares)
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    logits, _ = kept_logits(model, inputs, kept)
    found = []
    for share in shares:
        own = (labels[share.rows] != IGNORED).any(dim=0)[kept]
        part = logits[share.rows][:, own.to(logits.device)]
        found.append(_scored(part, labels[share.rows][:, kept[own]], share.scoring, None))
    return found


def kept_logits(model: nn.Module, inputs: dict[str, Any], kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits (b, kept, v) of these positions, and the router's loss, if any."""
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if _keeps_logits(cast(Hashable, type(model_of(model)))):
        out = model(**inputs, logits_to_keep=kept, use_cache=False)
        return out.logits, getattr(out, "aux_loss", None)
    out = model(**inputs, use_cache=False)
    return out.logits[:, kept], getattr(out, "aux_loss", None)


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


def _loss_in_chunks(model: nn.Module, head: FrozenHead, inputs: dict[str, Any]) -> TokenLoss:
    """The same loss of a fused model, without the logits of all tokens in memory."""
    hidden, head, labels, aux = hidden_states(model, head, inputs)
    options = HeadOptions(num_items=1.0)
    total, hits = linear_cross_entropy_and_hits(hidden, head.weight, labels, head.bias, options)
    return TokenLoss(total, (labels != IGNORED).sum(), hits, aux)


def _row_losses_in_chunks(
    model: nn.Module, head: FrozenHead, inputs: dict[str, Any], shares: Sequence[Share]
) -> list[TokenLoss]:
    hidden, head, labels, _ = hidden_states(model, head, inputs)
    losses, hits = linear_cross_entropy_rows(hidden, head.weight, labels, head.bias)
    n_rows = inputs["labels"].shape[0]
    losses, hits, trained = (t.view(n_rows, -1) for t in (losses, hits, labels != IGNORED))
    return [TokenLoss(losses[s.rows].sum(), trained[s.rows].sum(), hits[s.rows].sum(), None) for s in shares]


def hidden_states(
    model: nn.Module, head: FrozenHead, inputs: dict[str, Any]
) -> tuple[Tensor, FrozenHead, Tensor, Tensor | None]:
    """Return hidden states (b * (t - 1), d), the head in its compute dtype, the labels, and the router's
    loss, if any.
    """
    labels: Tensor = inputs["labels"][:, 1:].flatten()
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    with hidden_as_logits(model_of(model)) as passed:
        out = model(**rest, use_cache=False)
    hidden = out.logits[:, :-1].flatten(0, 1)
    dtype = cast(torch.dtype, passed.dtype)
    if isinstance(head.weight, Tensor):
        head = replace(head, weight=head.weight.to(dtype))
    return hidden.to(dtype), head, labels.to(hidden.device), getattr(out, "aux_loss", None)


def head_of_fused(model: nn.Module) -> FrozenHead | None:
    """Return the head of a fused model, alone or in the wrapper that joins the gradients of processes.

    No other wrapper's forward pass runs the same modules that it holds.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return fused_head(inner) if model_of(inner) is inner else None


def model_of(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@functools.cache
def _keeps_logits(cls: Hashable) -> bool:
    return "logits_to_keep" in inspect.signature(cast("type[nn.Module]", cls).forward).parameters
