"""Positions from which adapters act in a sequence: from their invocation tokens on (aLoRA), or everywhere.

Before these tokens, keys and values are the base's. Tokens of a batch are therefore routed one by one: those before
their row's start have no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from veneer.errors import CompositionError, ConfigError
from veneer.model.adapted.routing import BASE, TokenRouting
from veneer.model.adapted.site import Adapted
from veneer.model.adapted.state import AdapterState
from veneer.model.batch.mixed import routed
from veneer.model.sites.virtual_tokens import CACHE_NAMES
from veneer.plain.invocation import NEVER, acts_from

PACKED = (
    "adapters with invocation tokens cannot train on packed rows (position_ids start again within a row): switch "
    "packing, eval_packing and padding_free off"
)
Inputs = tuple[Sequence[Any], Mapping[str, Any]]
T = TypeVar("T")


@contextmanager
def from_invocation(model: nn.Module, state: AdapterState, inputs: Inputs) -> Iterator[None]:
    """Enter a context for one forward pass in which each adapter acts from its invocation tokens on.

    Nothing changes if no acting adapter has such tokens. ``inputs`` are the arguments of the pass. In a generation the
    starts are those of the prompts. Raises ConfigError if a row that trains or continues a cache lacks the tokens.
    Raises CompositionError if an adapter with such tokens acts together with another.
    """
    routing = state.routed()
    is_known = routing is not None and routing.is_by_token
    if is_known or not acting_tokens(model):
        yield
        return
    ids = _input_ids(inputs)
    rows = _names_of_rows(state, ids.shape[0])
    if state.starts is None:
        starts, past = _starts(state, rows, ids), 0
        _require_found(model, state, rows, starts, inputs)
    else:
        starts, past = _repeated(state.starts, ids.shape[0]), _past(inputs)
    moved = tuple(max(start - past, 0) for start in starts)
    drawn = {} if routing is None else routing.generators
    tasks = () if routing is None else _repeated(routing.tasks, ids.shape[0])
    by_token = TokenRouting(rows, drawn, is_by_token=True, tasks=tasks, starts=moved, width=ids.shape[1])
    with routed(model, state, by_token), _head_sees(model, state, by_token, inputs):
        yield


@contextmanager
def generating(state: AdapterState, inputs: Inputs) -> Iterator[None]:
    """Enter a context for a generation: in all its passes, each adapter acts from the first invocation tokens of its
    row's prompt on.
    """
    if not any(_tokens(state, name) for name in _acting(state)):
        yield
        return
    ids = _input_ids(inputs)
    before, state.starts = state.starts, _starts(state, _names_of_rows(state, ids.shape[0]), ids)
    try:
        yield
    finally:
        state.starts = before


def acting_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return the invocation tokens of the first acting adapter that has some; empty if all adapters act everywhere."""
    state = getattr(model, "adapter_state", None)
    return () if state is None else next(filter(None, (_tokens(state, name) for name in _acting(state))), ())


@contextmanager
def _head_sees(model: nn.Module, state: AdapterState, routing: TokenRouting, inputs: Inputs) -> Iterator[None]:
    """Enter a context in which an adapted head is routed by the tokens of ``logits_to_keep``, because it receives only
    these. Other layers are routed by all tokens.
    """
    kept, head_of = inputs[1].get("logits_to_keep"), getattr(model, "get_output_embeddings", None)
    head = None if head_of is None else head_of()
    if kept is None or not isinstance(head, Adapted):
        yield
        return
    at = slice(-kept, None) if isinstance(kept, int) else kept.cpu()  # as transformers' models read it
    of_head = routing.at(torch.arange(routing.width)[at].tolist())
    hooks = (
        head.register_forward_pre_hook(lambda *_: setattr(state, "routing", of_head)),
        head.register_forward_hook(lambda *_: setattr(state, "routing", routing), always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _acting(state: AdapterState) -> tuple[str, ...]:
    routing = state.routed()
    return state.acting() if routing is None else routing.adapters


def _tokens(state: AdapterState, name: str) -> tuple[int, ...]:
    return () if name == BASE else state.configs[name].invocation_tokens


def _names_of_rows(state: AdapterState, n_rows: int) -> tuple[str, ...]:
    routing = state.routed()
    if routing is not None:
        return routing.rows(n_rows, "the model")
    names = state.acting()
    if len(names) > 1:
        raise CompositionError(
            f"{list(names)} are active together, and one of them acts from its invocation tokens on: activate it alone"
        )
    return names * n_rows


def _starts(state: AdapterState, rows: Sequence[str], ids: Int[Tensor, "rows n"]) -> tuple[int, ...]:
    """Return the position from which each row's adapter acts: 0 if it acts everywhere."""
    tokens = [_tokens(state, name) for name in rows]
    return tuple(acts_from(row, wanted) for row, wanted in zip(ids.tolist(), tokens, strict=True))


def _require_found(
    model: nn.Module, state: AdapterState, rows: Sequence[str], starts: Sequence[int], inputs: Inputs
) -> None:
    """Raise ConfigError if a row lacks its adapter's invocation tokens, and either continues a cache or trains this
    adapter. Also raise it if position ids decrease within a row, because the row then holds several packed sequences.
    """
    lacking = [row for row, start in enumerate(starts) if start == NEVER]
    if lacking and _past(inputs):
        raise ConfigError(
            f"rows {lacking[:5]} of the batch continue a cache, and their new tokens do not hold the invocation tokens "
            f"of {rows[lacking[0]]!r}, so its first position is unknown: use generate(), or give the whole sequence "
            "without a cache"
        )
    is_training = model.training and torch.is_grad_enabled()
    lacking = [row for row in lacking if is_training and rows[row] in state.trainable]
    if lacking:
        raise ConfigError(
            f"rows {lacking[:5]} of the batch do not hold the invocation tokens of {rows[lacking[0]]!r}: each row must "
            "hold alora_invocation_tokens. Put them before the answer in every row"
        )
    positions = inputs[1].get("position_ids")
    if positions is None or inputs[1].get("attention_mask") is not None:
        return
    if bool((positions[..., 1:] < positions[..., :-1]).any()):
        raise ConfigError(PACKED)


def _repeated(each: Sequence[T], n_rows: int) -> tuple[T, ...]:
    """Repeat each prompt's entry so that there is one for every row. A prompt has several rows in a beam search."""
    return tuple(own for own in each for _ in range(n_rows // len(each)))


def _input_ids(inputs: Inputs) -> Int[Tensor, "rows n"]:
    args, kwargs = inputs
    named = (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
    ids = next((x for x in named if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()), None)
    if ids is None:
        raise ConfigError(
            "an adapter with invocation tokens needs input_ids (rows, tokens), to find them there. Give them in place "
            "of inputs_embeds"
        )
    return ids


def _past(inputs: Inputs) -> int:
    """Return the number of tokens whose keys and values are in the cache."""
    caches = (inputs[1].get(name) for name in CACHE_NAMES)
    return max((int(cache.get_seq_length()) for cache in caches if cache is not None), default=0)
