"""Loss of each task's step: its forward passes over a micro-batch, in the trainer's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.token_scores import PreferenceScoring
from veneer.data.encoding import IGNORED
from veneer.data.tasks import OF_REWARDS
from veneer.learn.distill import taught_loss
from veneer.recipe.adapter import FROM
from veneer.train.loss import token_loss
from veneer.train.preference.reference import Reference
from veneer.train.preference.scores import ScoredModel

Loss = Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]


def reference_of(task: str, adapter: Mapping[str, Any], model: PreTrainedModel, args: Any) -> Reference | None:
    """Return the reference model that the trainer of a task holds, or None if it holds none. ``adapter`` is the adapter
    part of the recipe.

    The trainer also holds a reference if the reference log-probabilities are computed once before the run.
    """
    if task in ("sft", "distill") or (task in OF_REWARDS and not args.beta):
        return None
    return Reference(model, PreferenceScoring(details=False), fresh=FROM not in adapter)


def loss_of(task: str, reference: Reference | None, args: Any, n_taught: int = 0) -> Loss:
    """Return the loss function of a recipe's step. A teacher reads ``n_taught`` tokens before each row."""
    if task == "sft":
        return trained_tokens
    if task == "distill":
        return lambda model, inputs: distilled(model, inputs, args, n_taught)
    if task in OF_REWARDS:
        return lambda model, inputs: rewarded(model, inputs, args)
    asked = None if args.precompute_ref_log_probs else reference
    passes = pairs if task == "dpo" else labelled
    return lambda model, inputs: passes(model, asked, inputs, args)


def trained_tokens(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean loss over the trained tokens."""
    counted = token_loss(model, inputs)
    return counted.total / counted.n_tokens.clamp(min=1)


def pairs(model: PreTrainedModel, reference: Reference | None, inputs: dict[str, Tensor], args: Any) -> Tensor:
    """Return the loss of DPO, on rows whose first half is preferred to the second.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    scored = ScoredModel(model, PreferenceScoring(collision=bool(args.use_weighting)))(**inputs, fused_lm_head=True)
    ratio = scored.log_probs.sum(dim=1) - _referred(reference, inputs)
    chosen, rejected = ratio.chunk(2)
    return -nn.functional.logsigmoid(args.beta * (chosen - rejected)).mean()


def labelled(model: PreTrainedModel, reference: Reference | None, inputs: dict[str, Tensor], args: Any) -> Tensor:
    """Return the loss of KTO, on rows that are all desirable (Ethayarajh et al. 2024, arXiv:2402.01306).

    It includes both passes of the KL term if the loss has one.
    """
    scored, divergence = ScoredModel(model, PreferenceScoring()), torch.zeros(())
    if args.loss_type == "kto":
        with torch.no_grad():
            divergence = scored(**inputs, fused_lm_head=True).log_probs.sum(dim=1)
    ratio = scored(**inputs, fused_lm_head=True).log_probs.sum(dim=1) - _referred(reference, inputs)
    if args.loss_type == "kto":
        divergence = (divergence - _referred(reference, inputs)).mean().clamp(min=0)
    return 1 - torch.sigmoid(args.beta * (ratio - divergence)).mean()


def rewarded(model: PreTrainedModel, inputs: dict[str, Tensor], args: Any) -> Tensor:
    """Return the policy gradient's loss for answers whose advantage is 1. The entropy, which the log shows, is computed
    too.
    """
    scored = ScoredModel(model, PreferenceScoring(args.temperature))(**inputs, fused_lm_head=True)
    ratio: Tensor = (scored.log_probs - scored.log_probs.detach()).exp()
    return -ratio.mean()


def distilled(model: PreTrainedModel, inputs: dict[str, Tensor], args: Any, n_taught: int) -> Tensor:
    """Return the divergence from a teacher that reads ``n_taught`` tokens before each row."""
    front = torch.full((len(inputs["labels"]), n_taught), IGNORED, dtype=torch.long)
    before = {"input_ids": front.abs() % model.config.get_text_config().vocab_size, "labels": front}
    before["attention_mask"] = torch.ones_like(front)
    taught = {name: torch.cat([before[name], value], dim=1) for name, value in inputs.items()}
    counted = taught_loss(model, inputs, taught, args)
    mean: Tensor = counted.total / counted.n_tokens.clamp(min=1)
    return mean


def _referred(reference: Reference | None, inputs: dict[str, Tensor]) -> Tensor | float:
    """Return the reference model's log-probabilities, summed over the tokens of each row.

    ``reference`` is None if the log-probabilities were precomputed. Then return 0, because the step computes none.
    """
    return 0.0 if reference is None else reference(**inputs, fused_lm_head=True).log_probs.sum(dim=1)
