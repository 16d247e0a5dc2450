"""Forward pass over one row in which sequences branch off others: rows with the same beginning share its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.errors import CompositionError
from veneer.model.adapted.state import AdapterState
from veneer.model.blueprint.describe import blocks_of
from veneer.model.fused.block import FusedBlock, halves_of
from veneer.model.fused.decoder import FusedDecoder, counts_positions, stream_dtype
from veneer.model.fused.layout import LayoutMask
from veneer.model.program.acting import computed_in
from veneer.model.sharded.sharding import is_cut


class UnforkedError(CompositionError):
    """Error of a pass in which rows cannot share tokens. It is raised before a block has run."""


@contextmanager
def forked(model: PreTrainedModel, layout: LayoutMask) -> Iterator[None]:
    """Enter a context for a pass over one row with this layout. `cannot_fork` must have returned None for the model.

    The pass raises UnforkedError before its first block if a block would run its own attention. The caller cannot know
    that before: the autocast of a prepared model begins within its forward pass.
    """

    def layout_now() -> LayoutMask:
        _refuse_unfused(model)
        return layout

    decoder = vars(blocks_of(model)[0])
    decoder["forked"] = layout_now
    try:
        yield
    finally:
        del decoder["forked"]


def cannot_fork(model: nn.Module) -> str | None:
    """Return why rows of a model cannot share their common beginning in its current state, or None if they can.

    Each token must have the same result as in a separate row. So nothing may depend on a row as a whole, or be random.
    Adapters that are switched off count too, so that a reference pass without them computes in the same way as the
    trained model's pass. Only a forward pass shows if attention runs fused, which `forked` checks.
    """
    if not isinstance(model, PreTrainedModel) or not any(isinstance(m, FusedDecoder) for m in model.modules()):
        return "its blocks do not run fused"
    decoder = blocks_of(model)[0]
    if is_cut(model):
        return "it is sharded over processes"
    if counts_positions(decoder) or decoder is not model.base_model:
        return "it counts positions itself"
    if getattr(model.config, "output_router_logits", False):
        return "its router is balanced over all tokens of the rows"
    return _drawn_at_random(model) or _of_rows(getattr(model, "adapter_state", None))


def _drawn_at_random(model: PreTrainedModel) -> str | None:
    if not model.training:
        return None
    state: AdapterState | None = getattr(model, "adapter_state", None)
    if state is not None and state.drops and any(state.configs[name].dropout for name in state.active):
        return "its adapter has dropout, which disable_dropout switches off"
    if state is not None and any(state.configs[name].draws_by_token for name in state.active):
        return "its adapter draws numbers for each token"
    if any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in model.modules()):
        return "it has dropout"
    noise = getattr(model.get_input_embeddings(), "neftune_noise_alpha", None)
    return "its embeddings have noise (neftune_noise_alpha)" if noise else None


def _of_rows(state: AdapterState | None) -> str | None:
    if state is None:
        return None
    if state.routed() is not None:
        return "rows have adapters of their own"
    of_rows = any(
        config.virtual_tokens or config.invocation_tokens or config.by_sequence
        for config in (state.configs[name] for name in state.active)
    )
    return "its adapter depends on whole rows" if of_rows else None


def _refuse_unfused(model: PreTrainedModel) -> None:
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    stream = stream_dtype(model, blocks[0])
    dtype = computed_in(torch.empty(0, dtype=stream, device=model.device))
    if dtype is None or any(halves_of(block, stream, dtype)[0] is None for block in blocks):
        raise UnforkedError("the attention of some of its blocks is not fused")
