"""Log-probabilities of a batch's tokens, and the values that the logs show, computed without the logits
of all tokens.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from veneer.adapters.shared_rows import SharedRows, shared_rows
from veneer.data.encoding import IGNORED
from veneer.model.fused.deferred import DeferredLogits
from veneer.model.fused.forked import UnforkedError, cannot_fork, forked
from veneer.model.fused.head import deferred_logits
from veneer.ops.cross_entropy import LabelScores as HeadScores
from veneer.ops.cross_entropy import linear_token_scores

log = logging.getLogger(__name__)
_KEYS = {"input_ids", "attention_mask", "labels"}
_TOLD = weakref.WeakSet[nn.Module]()  # models whose rows are computed apart


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Outputs of a forward pass that TRL's trainers read, under its names. Each is (b, t - 1), and 0 where no label
    counts.

    ``log_probs`` are those of the labels, in nats; ``entropy`` is that of the predicted distributions.
    ``log_sum_sq_probs`` is the logarithm of their collision probability; ``mean_logits`` is the mean over the
    vocabulary. ``is_top1`` is True where the label was the most probable token. ``aux_loss`` is that of a router.
    """

    log_probs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"] | None
    log_sum_sq_probs: Float[Tensor, "b t"] | None
    mean_logits: Float[Tensor, "b t"] | None
    is_top1: Bool[Tensor, "b t"] | None
    aux_loss: Float[Tensor, ""] | None


@dataclass(frozen=True, slots=True)
class PreferenceScoring:
    """Settings for scores of tokens. Logits are divided by ``temperature``.

    ``details`` also computes entropies, mean logits and whether each token is the likeliest. ``collision`` adds the sum
    of squared probabilities. With ``entropy_learns`` a gradient flows through the entropy.
    """

    temperature: float = 1.0
    details: bool = True
    collision: bool = False
    entropy_learns: bool = False


def token_scores(model: nn.Module, inputs: dict[str, Any], scoring: PreferenceScoring) -> TokenScores:
    """Score the tokens of ``inputs["labels"]`` (b, t), shifted by one; labels of -100 do not count.

    Hidden states go through a frozen head chunk by chunk. Otherwise logits are computed at the positions at which any
    label counts. Left padding is removed first, because it would shift learned positions, and separate virtual tokens
    from their prompt. If several rows have the same prompt, the model computes it once, if it can.
    """
    inputs = {key: value for key, value in inputs.items() if key != "use_cache"}
    rows = _shared(model, inputs)
    if rows is not None:
        try:
            return _scores_of_shared(model, rows, inputs["labels"][:, 1:].shape, scoring)
        except UnforkedError as error:
            _tell_apart(model, str(error))
    n_before = _padding_before(inputs)
    if n_before is None:
        return _scores_of(model, inputs, scoring)
    columns = torch.arange(inputs["labels"].shape[1], device=n_before.device)
    there = (columns + n_before) % len(columns)
    back = (columns[:-1] - n_before) % (len(columns) - 1)
    found = _scores_of(model, {key: value.gather(1, there) for key, value in inputs.items()}, scoring)
    return _moved(found, lambda x: x.gather(1, back.to(x.device)))


def _padding_before(inputs: dict[str, Any]) -> Tensor | None:
    """Return the number of padding tokens before each row, (b, 1). Return None if no row begins with padding, or if the
    keys of ``inputs`` are not `_KEYS`.
    """
    mask = inputs.get("attention_mask")
    if mask is None or inputs.keys() != _KEYS or bool(mask[:, 0].all()):
        return None
    n_before: Tensor = mask.int().argmax(dim=1, keepdim=True)
    return n_before


def _shared(model: nn.Module, inputs: dict[str, Any]) -> SharedRows | None:
    """Return the batch as one row. Return None if joining the rows saves little, or if the model cannot run the joined
    row, which is logged once.
    """
    if inputs.keys() != _KEYS or inputs["attention_mask"] is None or inputs["attention_mask"].ndim != 2:
        return None
    found = shared_rows(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    reason = None if found is None else cannot_fork(model_of(model))
    if reason is None:
        return found
    _tell_apart(model, reason)
    return None


def _tell_apart(model: nn.Module, reason: str) -> None:
    if model not in _TOLD:
        _TOLD.add(model)
        log.info("each answer computes its prompt again, instead of once for all answers to it: %s", reason)


def _scores_of_shared(model: nn.Module, rows: SharedRows, shape: torch.Size, scoring: PreferenceScoring) -> TokenScores:
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
    with forked(cast(PreTrainedModel, model_of(model)), rows.layout):
        found = unmade_logits(model, inputs)
        if found is None:
            kept, at = torch.unique(rows.predicting, return_inverse=True)
            found = kept_logits(model, inputs, kept)
        else:
            at = rows.predicting
    scores = _label_scores(found[0].flatten(0, 1), rows.labels, scoring, at)
    return _made(scores, lambda values: _at_places(values, rows.places, shape), found[1])


def _at_places(values: Tensor | None, places: Tensor, shape: torch.Size) -> Tensor | None:
    if values is None:
        return None
    return values.new_zeros(shape.numel()).index_copy(0, places.to(values.device), values).view(shape)


def _scores_of(model: nn.Module, inputs: dict[str, Any], scoring: PreferenceScoring) -> TokenScores:
    found = next_tokens(model, inputs)
    if found is not None:
        return _scored_in_chunks(found, inputs["labels"][:, 1:].shape, scoring)
    labels: Int[Tensor, "b t"] = inputs["labels"][:, 1:]
    kept = (labels != IGNORED).any(dim=0).nonzero().flatten()
    logits, aux = kept_logits(model, inputs, kept)
    wide = logits.float() / scoring.temperature
    return _spread(_scored(wide, labels[:, kept].to(wide.device), scoring.details), labels, kept, aux)


def _scored_in_chunks(found: NextTokens, shape: Sequence[int], scoring: PreferenceScoring) -> TokenScores:
    return _told(_label_scores(found.logits, found.labels, scoring), shape, found.aux)


def _label_scores(logits: Tensor, labels: Tensor, scoring: PreferenceScoring, at: Tensor | None = None) -> HeadScores:
    """Return the scores of labels from logits (n, v), or from the rows ``at`` of the logits.

    Deferred logits are scored in chunks, so that the matrix of all logits is never in memory.
    """
    logits = logits if scoring.temperature == 1 else logits / scoring.temperature
    if not isinstance(logits, DeferredLogits):
        own = logits if at is None else logits[at.to(logits.device)]
        return _scored(own.float(), labels.to(logits.device), scoring.details)
    hidden, weight, bias, options = logits.operands()
    return linear_token_scores(
        hidden if at is None else hidden[at.to(hidden.device)],
        weight,
        labels.to(hidden.device),
        bias,
        options,
        details=scoring.details,
        collision=scoring.collision,
        entropy_learns=scoring.entropy_learns,
    )


def _scored(logits: Tensor, labels: Tensor, details: bool) -> HeadScores:
    """Compute the scores from logits (…, v) by their definitions."""
    counted = labels != IGNORED
    log_p = logits.log_softmax(dim=-1)
    own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if not details:
        return HeadScores(own * counted, None, None, None, None)
    p = log_p.exp()
    return HeadScores(
        own.masked_fill(~counted, 0.0),
        -(p * log_p).sum(dim=-1).masked_fill(~counted, 0.0),
        (2 * log_p.detach()).logsumexp(dim=-1).masked_fill(~counted, 0.0),
        logits.detach().mean(dim=-1).masked_fill(~counted, 0.0),
        (logits.detach().argmax(dim=-1) == labels) & counted,
    )


def _spread(found: HeadScores, labels: Tensor, kept: Tensor, aux: Tensor | None) -> TokenScores:
    """Spread the scores of the ``kept`` positions (b, k) over all positions (b, t - 1)."""

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(labels.shape).index_copy(1, kept.to(values.device), values)

    return _made(found, spread, aux)


def _told(found: HeadScores, shape: Sequence[int], aux: Tensor | None) -> TokenScores:
    return _made(found, lambda values: None if values is None else values.view(*shape), aux)


def _moved(found: TokenScores, moved: Callable[[Tensor], Tensor]) -> TokenScores:
    """Apply ``moved`` to every score that has a value for each row. The auxiliary loss and absent scores stay."""
    return replace(
        found,
        **{
            each.name: moved(value)
            for each in fields(found)
            if (value := getattr(found, each.name)) is not None and each.name != "aux_loss"
        },
    )


def _made(found: HeadScores, shaped: Callable[[Tensor | None], Tensor | None], aux: Tensor | None) -> TokenScores:
    return TokenScores(
        log_probs=cast(Tensor, shaped(found.log_probs)),
        entropy=shaped(found.entropy),
        log_sum_sq_probs=shaped(found.log_sum_sq_probs),
        mean_logits=shaped(found.mean_logits),
        is_top1=shaped(found.is_top1),
        aux_loss=aux,
    )


@dataclass(frozen=True, slots=True)
class NextTokens:
    """Logits that predict the next tokens of a batch (b, t), the tokens themselves (``labels``), and the router's loss,
    if any.

    The logits are computed only if the model's own code reads them.
    """

    logits: Float[Tensor, "n v"]
    labels: Int[Tensor, " n"]
    aux: Float[Tensor, ""] | None


def next_tokens(model: nn.Module, inputs: dict[str, Any]) -> NextTokens | None:
    """Return the logits that predict a batch's next tokens, with these tokens and the router's loss.

    Return None unless the model's head is frozen and unadapted.
    """
    found = unmade_logits(model, {key: value for key, value in inputs.items() if key != "labels"})
    if found is None:
        return None
    logits = found[0][:, :-1].flatten(0, 1)
    return NextTokens(logits, inputs["labels"][:, 1:].flatten().to(logits.device), found[1])


def unmade_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Return the logits (b, t, v) of a pass, which are computed only when they are read, and the router's loss, if any.

    Return None unless the model's head is frozen and unadapted. A DDP wrapper around the model is allowed. Other
    wrappers are not, because they may run modules of their own.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with deferred_logits(inner) as defers:
        if not defers:
            return None
        out = model(**inputs, use_cache=False)
    return out.logits, getattr(out, "aux_loss", None)


def kept_logits(model: nn.Module, inputs: dict[str, Any], kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits (b, kept, v) of the positions ``kept`` alone, and the router's loss, if any."""
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if _keeps_logits(cast(Hashable, type(model_of(model)))):
        out = model(**inputs, logits_to_keep=kept, use_cache=False)
        return out.logits, getattr(out, "aux_loss", None)
    out = model(**inputs, use_cache=False)
    return out.logits[:, kept], getattr(out, "aux_loss", None)


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


def has_own_loss(model: nn.Module) -> bool:
    """Return True if an active adapter has a loss of its own, see `MethodConfig.has_own_loss`."""
    state = getattr(model, "adapter_state", None)
    return state is not None and any(state.configs[name].has_own_loss for name in state.acting())
