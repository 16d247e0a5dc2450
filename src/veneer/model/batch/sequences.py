"""Sequences of a forward pass, for adapters whose change depends on a whole sequence (Lily)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import CompositionError
from veneer.model.adapted.state import AdapterState
from veneer.records.sequences import Sequences

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


def by_sequence(state: AdapterState) -> bool:
    """Return True if an active adapter's change depends on whole sequences."""
    return any(state.configs[name].by_sequence for name in _acting(state))


@contextmanager
def with_sequences(model: nn.Module, state: AdapterState, inputs: Inputs) -> Iterator[None]:
    """Enter a context for one forward pass that tells the layers its sequences, if an active adapter depends on them.

    ``inputs`` are the arguments of the pass, which show padding and packed rows. Checkpointed blocks are computed again
    with the same sequences. Raises CompositionError if an adapter with virtual tokens is active too, or if the mask is
    not 2-D.
    """
    if not by_sequence(state):
        yield
        return
    if any(state.configs[name].virtual_tokens for name in _acting(state)):
        raise CompositionError(
            "an adapter that depends on whole sequences acts beside one with virtual tokens, which belong to no "
            "sequence: run the two one after another"
        )
    found = _sequences(model, inputs)
    kept = {module: module._gradient_checkpointing_func for module in _checkpointing(model)}
    for module, checkpoint in kept.items():
        module._gradient_checkpointing_func = _again_with(checkpoint, state, found)
    try:
        with state.knowing(found):
            yield
    finally:
        for module, checkpoint in kept.items():
            module._gradient_checkpointing_func = checkpoint


def _acting(state: AdapterState) -> tuple[str, ...]:
    routing = state.routed()
    return state.acting() if routing is None else routing.adapters


def _sequences(model: nn.Module, inputs: Inputs) -> Sequences | None:
    """Return the sequences of the input tokens, or None if there are no tokens, or encoder and decoder
    both have some.
    """
    args, kwargs = inputs
    named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None)
    given = next((x for x in named if isinstance(x, Tensor) and x.ndim == 2 + x.is_floating_point()), None)
    if given is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    (rows, n), mask, positions = given.shape[:2], kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        return Sequences.of(_on_tokens(mask)[:, -n:].long(), device=given.device)
    everywhere = torch.ones(rows, n, dtype=torch.long, device=given.device)
    has_positions = isinstance(positions, Tensor) and positions.ndim == 2
    return Sequences.of(everywhere, positions if has_positions else None, given.device)


def _on_tokens(mask: object) -> Tensor:
    """Return the attention mask if it is (rows, n), one value for each token. Raise CompositionError for any other
    mask, such as (rows, heads, n, n), because it does not tell which tokens are padding.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    told = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise CompositionError(
        f"attention_mask is {told}, from which an adapter that depends on whole sequences cannot tell padding: give a "
        "2-D attention_mask, or leave cache_implementation out"
    )


def _checkpointing(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]


def _again_with(checkpoint: Callable[..., Any], state: AdapterState, known: Sequences | None) -> Callable[..., Any]:
    """Wrap ``checkpoint`` so that adapters know the batch's sequences while a checkpointed function runs, also when the
    backward pass recomputes it.
    """

    @wraps(checkpoint)
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*inner: Any, **named: Any) -> Any:
            with state.knowing(known):
                return function(*inner, **named)

        return checkpoint(again, *args, **kwargs)

    return run
