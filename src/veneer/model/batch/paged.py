"""Attention over pages: keys and values of many sequences in one store, where each batch row is one token of a
sequence.

A model is run by transformers' own forward pass; `AttentionInterface` routes its attention layers here. Masks come from
transformers' own mask functions, so that windows and chunks are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from veneer.errors import TargetError
from veneer.model.sites.structure import evaluation

NAME = "veneer_paged"
KeysValues = tuple[Tensor, Tensor]


class SlotStore:
    """Keys and values by layer and slot, (slots, kv_heads, width) each. Page p is the ``block`` slots from p ·
    ``block`` on.

    A layer's tensors are allocated when they are first written.
    """

    def __init__(self, n_pages: int, block: int) -> None:
        self.n_pages, self.block = n_pages, block
        self.layers: dict[int, KeysValues] = {}

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position, over all layers that have been written to."""
        return sum(x[0].nbytes for pair in self.layers.values() for x in pair)

    def slots(self, pages: Sequence[int], start: int, stop: int) -> list[int]:
        """Return the slots of a sequence's positions ``start`` to ``stop``."""
        return [pages[at // self.block] * self.block + at % self.block for at in range(start, stop)]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (n, kv_heads, width) into n slots."""
        if layer not in self.layers:
            n_slots = self.n_pages * self.block
            self.layers[layer] = (
                keys.new_empty(n_slots, *keys.shape[1:]),
                values.new_empty(n_slots, *values.shape[1:]),
            )
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept.index_copy_(0, slots, new.to(kept.dtype))

    def read(self, layer: int, slots: Tensor) -> KeysValues:
        """Return the keys and values in these slots."""
        keys, values = self.layers[layer]
        return keys[slots], values[slots]


class Stretch(NamedTuple):
    """Consecutive new tokens of one sequence: the sequence's pages, the position of the first token, and
    their number.
    """

    pages: tuple[int, ...]
    start: int
    n: int


@dataclass(frozen=True, slots=True)
class _Group:
    """g sequences with c new tokens each and at most L positions, computed together.

    ``rows`` (g, c) are the tokens' rows of the batch, ``positions`` (g, c) their positions. ``slots`` (g, L) are all
    slots that they may attend to.
    """

    rows: Tensor
    positions: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Rows of one pass: new tokens of several sequences, one sequence after another, each token a row.

    ``written``: the layers that the pass has run so far.
    """

    store: SlotStore
    slots: Tensor
    positions: Tensor
    groups: list[_Group]
    written: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, store: SlotStore, stretches: Sequence[Stretch], device: torch.device) -> PagedStep:
        """Build the rows for new tokens of several sequences, on a device."""
        where = [store.slots(s.pages, 0, s.start + s.n) for s in stretches]
        slots = [slot for s, at in zip(stretches, where, strict=True) for slot in at[s.start :]]
        positions = torch.tensor([at for s in stretches for at in range(s.start, s.start + s.n)], device=device)
        groups = _groups(stretches, where, positions)
        return cls(store, torch.tensor(slots).to(device), positions, groups)


def _groups(stretches: Sequence[Stretch], where: Sequence[list[int]], positions: Tensor) -> list[_Group]:
    first_rows, n_rows = [], 0
    for s in stretches:
        first_rows.append(n_rows)
        n_rows += s.n
    found = []
    for n in dict.fromkeys(s.n for s in stretches):
        members = [i for i, s in enumerate(stretches) if s.n == n]
        longest = max(len(where[i]) for i in members)
        slots = [where[i] + [where[i][-1]] * (longest - len(where[i])) for i in members]
        rows = torch.tensor([list(range(first_rows[i], first_rows[i] + n)) for i in members], device=positions.device)
        found.append(_Group(rows, positions[rows], torch.tensor(slots, device=positions.device)))
    return found


@dataclass(frozen=True)
class SeenKeys:
    """Mask of the keys to which each token attends, by transformers' mask function for a kind of layer."""

    mask_function: Callable[..., Any]
    _of: dict[int, Tensor] = field(default_factory=dict)

    def of(self, number: int, group: _Group) -> Tensor:
        """Return the mask (g, c, L) of group ``number`` of a step. Tokens see no slot after their own position."""
        if number not in self._of:
            queries = group.positions[:, :, None]
            keys = torch.arange(group.slots.shape[1], device=queries.device)[None, None]
            none = torch.zeros((), dtype=torch.long, device=queries.device)
            seen = self.mask_function(none, none, queries, keys)
            self._of[number] = torch.as_tensor(seen, device=queries.device) & (keys <= queries)
        return self._of[number]


_STEP: ContextVar[PagedStep] = ContextVar("the pass that runs now")


def _mask(*, mask_function: Callable[..., Any], **_: Any) -> SeenKeys:
    return SeenKeys(mask_function)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SeenKeys | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store the new keys and values, one token for each row. Then attend from each row's query (n, heads, 1, width) to
    the stored keys of its sequence, with its own.
    """
    step, layer = _STEP.get(), int(module.layer_idx)  # type: ignore[arg-type]
    if layer in step.written:
        raise RuntimeError(f"layer {layer} runs more than once in one pass")
    step.written.add(layer)
    step.store.write(layer, step.slots, key[:, :, 0], value[:, :, 0])
    seen = attention_mask or SeenKeys(_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = value.new_empty(query.shape[0], query.shape[1], value.shape[-1], dtype=query.dtype)
    for number, group in enumerate(step.groups):
        keys, values = (x.transpose(1, 2) for x in step.store.read(layer, group.slots))
        queries = query[:, :, 0][group.rows].transpose(1, 2)
        mask = seen.of(number, group)[:, None]
        out[group.rows] = attend(queries * scale, keys, values, mask, softcap, s_aux).transpose(1, 2)
    return out[:, None], None


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return softmax attention of scaled queries (g, heads, c, k) to keys (g, kv_heads, L, k) and values.

    Values are (g, kv_heads, L, v). Scores are capped by ``softcap · tanh(· / softcap)``. ``mask`` (g, 1, c, L) marks
    the visible keys, or (g, heads, c, L) is added to the scores. ``sinks`` (heads) take part in the softmax and
    contribute nothing. The formula is that of transformers' eager attention.
    """
    times = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(times, dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shown = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if shown else scores + mask.to(scores.dtype)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : values.shape[2]] @ values


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class PagedModel:
    """Model whose attention reads and writes pages during `run`. Outside of `run` the model computes attention as
    before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        found = (getattr(module, "config", None) for module in model.modules())
        self._configs = list({id(config): config for config in found if config is not None}.values())

    @torch.no_grad()
    def run(self, step: PagedStep, tokens: Tensor) -> Any:
        """Run one pass over rows of ids (n,) or embeddings (n, d). Return the model's output, (n, 1, …)."""
        given = {"inputs_embeds": tokens[:, None]} if tokens.is_floating_point() else {"input_ids": tokens[:, None]}
        with self._paged(step):
            return self.model(**given, position_ids=step.positions[:, None], use_cache=False)

    @contextmanager
    def _paged(self, step: PagedStep) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        token = _STEP.set(step)
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
            _STEP.reset(token)


# Kinds of layers, by transformers' names, that keep keys and values alone, or nothing.
PAGED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp", "dense", "sparse"})
# What code that has not been written for pages, or for a cache of one of its kinds, raises on them.
UNFIT = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def position_bytes(model: PreTrainedModel, ids: Tensor) -> tuple[int, Tensor]:
    """Run n ids in two chunks over pages. Return the bytes that a position keeps in pages, and the logits (n,
    vocabulary).

    Raises TargetError for a model that does not compute its attention over pages.
    """
    n = len(ids)
    store, chunks, rows = SlotStore(1, n), [], PagedModel(model)
    try:
        for start, stop in ((0, n - 4), (n - 4, n)):
            step = PagedStep.of(store, [Stretch((0,), start, stop - start)], model.device)
            chunks.append(rows.run(step, ids[start:stop]).logits[:, 0])
    except UNFIT as error:
        raise TargetError(f"its code fails with paged keys and values ({type(error).__name__}: {error})") from error
    if not store.layers:
        raise TargetError("its layers store no keys and values in pages")
    return store.bytes_per_position, torch.cat(chunks)


def require_paged_layers(model: PreTrainedModel) -> None:
    """Raise TargetError if a model's code or config shows that it cannot run on pages, for example because its layers
    keep more than keys and values.
    """
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        raise TargetError("it has an encoder")
    if "position_ids" not in takes or not model._can_set_attn_implementation():
        raise TargetError(
            "it does not take position_ids, or does not compute attention by transformers' AttentionInterface"
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - PAGED_LAYERS
    if kinds:
        raise TargetError(f"its layers of the kinds {sorted(kinds)} keep more than keys and values")
    if getattr(model, "_is_stateful", False):
        raise TargetError("its layers keep more than keys and values")


@torch.no_grad()
def require_pageable(model: PreTrainedModel, n: int = 13) -> int:
    """Return the bytes of a position in pages, after a check on one short sequence that the model supports pages.

    Its logits, in two chunks of rows, are compared with those of the model's own pass. Raises TargetError with the
    reason if they differ, or if the model keeps more than keys and values.
    """
    require_paged_layers(model)
    ids = torch.arange(n, device=model.device) * 7 % model.config.get_text_config().vocab_size
    with evaluation(model):
        own = model(input_ids=ids[None], use_cache=False).logits[0].float()
        n_bytes, logits = position_bytes(model, ids)
    error = float((logits.float() - own).norm() / own.norm().clamp_min(1e-30))
    allowed = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    if not error <= allowed:
        raise TargetError(f"with paged keys and values its logits differ by {error:.1e} (allowed {allowed:.0e})")
    return n_bytes


TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
