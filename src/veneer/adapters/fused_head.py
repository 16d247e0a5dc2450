"""Scores of an adapted model for TRL's trainers, which call it as `model(…, labels=…, fused_lm_head=True)`.

TRL's own code reads the head's weight. It would leave out an adapter on the head, and mistake codes for weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from veneer.adapters.token_scores import PreferenceScoring, has_own_loss, token_scores
from veneer.data.encoding import IGNORED
from veneer.errors import CompositionError
from veneer.model.fused.head import head_of


@dataclass
class ScoredTokens(ModelOutput):  # type: ignore[misc]
    """Fields of TRL's `FusedCausalLMOutput`; see `TokenScores`. ``label_mask`` (b, t - 1) is True if a label counts."""

    loss: Float[Tensor, ""] | None = None
    log_probs: Float[Tensor, "b t"] | None = None
    entropy: Float[Tensor, "b t"] | None = None
    log_sum_sq_probs: Float[Tensor, "b t"] | None = None
    mean_logits: Float[Tensor, "b t"] | None = None
    is_top1: Bool[Tensor, "b t"] | None = None
    label_mask: Bool[Tensor, "b t"] | None = None
    aux_loss: Float[Tensor, ""] | None = None


def scored_tokens(model: nn.Module, kwargs: Mapping[str, Any]) -> ScoredTokens | None:
    """Return the scores of the labels in a call of the model, computed from hidden states in chunks if the head is
    frozen.

    Return None if the call asks for no scores, or if it asks for other outputs too and TRL's own code is right. Raises
    CompositionError if TRL's own code would be wrong, or if an adapter has a loss of its own.
    """
    if not kwargs["fused_lm_head"]:
        return None
    if has_own_loss(model):
        raise CompositionError(
            "the adapter has a loss of its own, which TRL's trainers leave out. Use veneer's trainer"
        )
    inputs = {key: value for key, value in kwargs.items() if key not in ("fused_lm_head", "num_items_in_batch")}
    asked = _asked(model)
    if asked is None or asked["cast_lm_head_to_fp32"] or inputs.get("shift_labels") is not None:
        _refuse_unreadable(model)
        return None
    outputs = asked["outputs"]
    scoring = PreferenceScoring(
        asked["temperature"],
        details=len(outputs) > 1,
        collision="log_sum_sq_probs" in outputs,
        entropy_learns="entropy" in outputs and torch.is_grad_enabled(),
    )
    scores = token_scores(model, inputs, scoring)
    mask = inputs["labels"][:, 1:] != IGNORED
    n_items = kwargs.get("num_items_in_batch")
    loss = -scores.log_probs.sum() / (mask.sum().clamp(min=1) if n_items is None else n_items)
    if scores.aux_loss is not None:
        config = cast(PreTrainedModel, model).config.get_text_config()
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * scores.aux_loss
    found = {name: getattr(scores, name) for name in ("log_probs", *outputs)}
    return ScoredTokens(loss=loss, label_mask=mask, aux_loss=scores.aux_loss, **found)


def _refuse_unreadable(model: nn.Module) -> None:
    head = head_of(model)
    if head is None or not isinstance(head.weight, Tensor):
        raise CompositionError(
            "TRL's fused head reads the weight of the head, and this one is adapted, trained, quantized or cut. Use "
            "veneer's trainer of the same name, or set neither cast_lm_head_to_fp32 nor context parallelism"
        )


def _asked(model: nn.Module) -> Mapping[str, Any] | None:
    """Return the settings of TRL's `add_fused_lm_head`. They are stored only in the forward function
    that it installed.
    """
    forward: Callable[..., Any] | None = vars(model).get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if {"temperature", "outputs", "cast_lm_head_to_fp32"} <= set(names):
            cells = cast(FunctionType, function).__closure__ or ()
            return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        forward = getattr(function, "__wrapped__", None)
    return None
