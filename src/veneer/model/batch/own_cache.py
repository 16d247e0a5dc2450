"""Sequences in transformers' own caches, one cache for each. A cache may hold keys, states or windows of any model."""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import TargetError
from veneer.model.batch.paged import TOLERANCE, UNFIT
from veneer.model.sites.structure import evaluation
from veneer.model.sites.virtual_tokens import CACHE_NAMES, inner_model
from veneer.plain.tensor_tree import told_bytes

_CACHES = (*CACHE_NAMES, "cache_params", "state")
_FEW_PARAMETERS = (
    100_000_000  # so small a model is proved in float32: what a state adds may be below the rounding of 16 bits
)
_ROUNDINGS = 10  # that two ways of computing the same may be apart
_CUTS = (9, 4)  # tokens of the proof, in two stretches


class Way(enum.Enum):
    """Ways in which a model computes the next tokens of a sequence: with its cache, all at once or one by one, or
    without one.
    """

    AT_ONCE = "its next tokens in one pass"
    ONE_BY_ONE = "its next tokens one by one"
    ANEW = "all of its tokens again, as its code keeps no cache that is right"


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """Bytes that a sequence keeps in memory: those for each ``position``, those for a ``sequence`` of any length, and
    those of a ``page`` besides its positions.
    """

    position: int
    sequence: int = 0
    page: int = 0


@dataclass(slots=True)
class Held:
    """A sequence in progress: its computed ``tokens`` and transformers' ``cache`` of them.

    ``is_whole`` is False after an interrupted pass, whose tokens may be in the cache in part. In a model with an
    encoder, the first ``n_prompt`` tokens are the encoder's, ``encoded`` is its output, and ``answer`` holds the tokens
    that the decoder has read.
    """

    tokens: list[int] = field(default_factory=list)
    cache: Any = None
    is_whole: bool = True
    n_prompt: int = 0
    encoded: Any = None
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Extended:
    """Logits (n, vocabulary) and last hidden states (n, width) of n new tokens; states are empty unless asked for."""

    logits: Tensor
    states: Tensor


class CachingModel:
    """Model that extends sequences one at a time, each from its own cache."""

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        self.model, self.way = model, way
        taken = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in taken), None)

    @torch.no_grad()
    def extend(self, held: Held, tokens: Sequence[int], *, with_states: bool = False) -> Extended:
        """Compute the next tokens of a sequence and add them to ``held``."""
        states: list[Tensor] = []
        handle = inner_model(self.model).register_forward_hook(_keep(states)) if with_states else None
        try:
            logits = torch.cat([self._pass(held, part) for part in self._parts(held, tokens)])
        finally:
            if handle is not None:
                handle.remove()
        n = len(tokens)
        return Extended(logits[-n:], torch.cat(states)[-n:] if states else logits.new_empty(0, 0))

    def _parts(self, held: Held, tokens: Sequence[int]) -> list[Sequence[int]]:
        alone = self.way is Way.ONE_BY_ONE and bool(held.tokens)
        return [[token] for token in tokens] if alone else [tokens]

    def _pass(self, held: Held, tokens: Sequence[int]) -> Tensor:
        """Run the model on ``tokens`` and return logits. Without a cache, all earlier tokens run again, and their
        logits precede those of ``tokens``.
        """
        anew = self.way is Way.ANEW
        ids = torch.tensor([[*held.tokens, *tokens] if anew else tokens], device=self.model.device)
        given = {} if held.cache is None or self._cache is None else {self._cache: held.cache}
        held.is_whole = False
        output = self.model(input_ids=ids, use_cache=not anew, **given)
        held.cache = None if anew else output.get(self._cache)
        held.tokens += tokens
        held.is_whole = True
        return cast(Tensor, output.logits)[0]


def _keep(states: list[Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[0])

    return keep


def proved_way(model: PreTrainedModel) -> Way:
    """Return the fastest way to extend a sequence for which the logits equal those of the model's pass over the whole
    sequence.

    Raises TargetError for a model that computes no logits from token ids alone.
    """
    kind = type(model).__name__
    if "perm_mask" in inspect.signature(model.forward).parameters:
        raise TargetError(
            f"{kind} cannot be served: it predicts a token by masks of permutations. Use model.generate(), which makes "
            "them"
        )
    if "mask_token_id" in inspect.unwrap(type(model).prepare_inputs_for_generation).__code__.co_names:
        raise TargetError(
            f"{kind} cannot be served: it predicts a token in the place of a mask. Use model.generate(), which adds "
            "the mask"
        )
    try:
        with evaluation(model), torch.no_grad():
            tried = _in_float32(model)
            ids = [at * 7 % tried.config.get_text_config().vocab_size for at in range(sum(_CUTS))]
            own = tried(input_ids=torch.tensor([ids], device=tried.device), use_cache=False).logits[0].float()
    except UNFIT as error:
        raise TargetError(
            f"{kind} cannot be served: it computes no logits from token ids alone ({error}). Give a model that "
            "predicts the next token"
        ) from error
    if not own.isfinite().all():
        raise TargetError(f"{kind} cannot be served: its logits are not finite. Load a model with finite weights")
    allowed = TOLERANCE.get(tried.dtype, TOLERANCE[torch.float32])
    at_once, one_by_one = (_error(tried, way, ids, own) for way in (Way.AT_ONCE, Way.ONE_BY_ONE))
    rounding = _ROUNDINGS * max(torch.finfo(tried.dtype).eps, min(one_by_one, allowed))
    if at_once <= min(allowed, rounding):  # a state that is left out may change little
        return Way.AT_ONCE
    return Way.ONE_BY_ONE if one_by_one <= allowed else Way.ANEW


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or a copy in float32 if it is small and not quantized."""
    parameters = list(model.parameters())
    plain = all(parameter.is_floating_point() for parameter in parameters)
    if not plain or model.dtype == torch.float32 or sum(p.numel() for p in parameters) > _FEW_PARAMETERS:
        return model
    return copy.deepcopy(model).float()


def _error(model: PreTrainedModel, way: Way, ids: list[int], own: Tensor) -> float:
    """Run ``ids`` in two parts, the second on the cache of the first. Return the relative distance between these logits
    and the logits ``own`` of one pass, or infinity if this cannot run.
    """
    held, caching = Held(), CachingModel(model, way)
    first = _CUTS[0]
    try:
        with evaluation(model):
            found = [caching.extend(held, part).logits.float() for part in (ids[:first], ids[first:])]
    except UNFIT:
        return float("inf")
    if held.cache is None:
        return float("inf")
    return float((torch.cat(found) - own).norm() / own.norm().clamp_min(1e-30))


def kept_bytes(model: PreTrainedModel, way: Way) -> KeptBytes:
    """Return the bytes that a sequence keeps in memory, measured on two short ones.

    Sliding windows count as if they grew with the sequence. Without a cache, only the tokens are kept. The model may be
    on the meta device, without values.
    """
    short, long = (0, 0) if way is Way.ANEW else (_bytes_after(model, n) for n in (_SHORT, 2 * _SHORT))
    if not long:
        return KeptBytes(_AN_ID)
    position = max(0, -(-(long - short) // _SHORT))
    return KeptBytes(position, max(0, short - position * _SHORT))


_SHORT = 16
_AN_ID = 8  # bytes: of a sequence without a cache its tokens are kept


def _bytes_after(model: PreTrainedModel, n: int) -> int:
    held = Held()
    with evaluation(model):
        CachingModel(model, Way.AT_ONCE).extend(held, [1] * n)
    return told_bytes(held.cache)
