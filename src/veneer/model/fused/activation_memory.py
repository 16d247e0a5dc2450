"""Keeps activations if memory suffices and recomputes them otherwise, as decided before every forward pass.

The trace of a fused model shows before the first pass how many bytes its blocks save for the backward pass
(`model.fused.saved_bytes`). In other models they are counted on the second block of the first pass, whose activations
are all kept. On a CPU there are three ways: all activations are kept, blocks are checkpointed selectively, or each
block is recomputed. On a GPU there are two: all are kept, or each block is recomputed from an input that waits in host
memory. The latter is the idea of Unsloth's "unsloth" checkpointing. Gradients are the same in each way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.model.fused.head import defers_logits
from veneer.model.fused.layout import LayoutMask
from veneer.model.fused.saved_bytes import SavedBytes, traced_bytes, weights_of
from veneer.model.memory.available import available_bytes
from veneer.model.memory.checkpointing import checkpoint_fully, selective_contexts
from veneer.model.memory.offload import ActivationOffload
from veneer.ops.cross_entropy import chunk_rows

log = logging.getLogger(__name__)

Way = Literal["kept", "selective", "recomputed"]
SHARE = 0.5
"""Of the memory that is free, what activations may take: the rest is for what else a step needs, and for others."""
SELECTIVE_SHARE = 0.5
"""Of what blocks keep, what selective checkpointing keeps at most (fused: 0.49, bench/training/checkpointing.py)."""
_REASONS: dict[Way, str] = {
    "kept": "are kept",
    "selective": "are checkpointed selectively",
    "recomputed": "are computed again, block by block",
}


def checkpoint_as_needed(model: nn.Module) -> None:
    """Enable gradient checkpointing for a transformers model, but keep all activations for which there is memory.

    The model's own `gradient_checkpointing_disable` ends it. Every change of the choice is logged.
    """
    checkpoint_fully(model)
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or 0
    seen = functools.partial(traced_bytes, model), functools.partial(defers_logits, model)
    plan = ActivationPlan(len(blocks), vocabulary, *seen)
    for index, block in enumerate(blocks):
        block._gradient_checkpointing_func = BlockActivations(plan, block, index)


class ActivationPlan:
    """Choice of the activations that a model's blocks keep in the current pass: everything, a part or nothing. All
    blocks keep the same.

    ``n_logits`` is the size of the vocabulary: float32 logits and their gradients need memory besides the activations.
    ``traced(hidden)`` returns the bytes that a block keeps for each token, or None if only a run can show it. If
    ``defers()`` is True, the pass computes logits chunk by chunk.
    """

    def __init__(
        self,
        n_blocks: int,
        n_logits: int,
        traced: Callable[[Tensor], float | None] = lambda hidden: None,
        defers: Callable[[], bool] = lambda: False,
    ) -> None:
        self.n_blocks, self.n_logits, self._traced, self._defers = n_blocks, n_logits, traced, defers
        self.way: Way = "kept"
        self.block_bytes: float | None = None  # a token, of one block
        self._logged: Way | None = None
        self._most_kept = 0  # tokens of the largest pass that was kept

    def begin(self, hidden: Tensor, *, fused: bool = False) -> None:
        """Choose how a pass over hidden states (…, width) keeps activations. ``fused``: the blocks run on fused
        kernels.

        Everything is kept until the bytes that a block keeps are known.
        """
        if self.block_bytes is None and fused:
            self.block_bytes = self._traced(hidden)
        if self.block_bytes is None:
            return
        n_tokens = hidden.numel() // hidden.shape[-1]
        blocks = n_tokens * self.block_bytes * self.n_blocks
        logits = self._logits_bytes(hidden, n_tokens)
        free = available_bytes(hidden.device)
        # Part of a pass that was kept the allocator may hold already: it is not free, and need not be.
        room = free if n_tokens <= self._most_kept else SHARE * free
        if blocks + logits <= room:
            self.way, self._most_kept = "kept", max(n_tokens, self._most_kept)
        else:
            halved = hidden.device.type == "cpu" and SELECTIVE_SHARE * blocks + logits <= room
            self.way, self._most_kept = "selective" if halved else "recomputed", 0
        if self.way != self._logged:
            log.info(
                "activations %s: a pass of %s tokens would keep about %.2f GB, and %.2f GB are free",
                _REASONS[self.way], f"{n_tokens:,}", (blocks + logits) / 1e9, free / 1e9,
            )  # fmt: skip
            self._logged = self.way

    def _logits_bytes(self, hidden: Tensor, n_tokens: int) -> int:
        """Return the bytes of the logits and of their gradients that a pass holds at a time.

        The gradients of a chunk overwrite its logits, in the dtype of the hidden states.
        """
        if not self._defers():
            return n_tokens * self.n_logits * 2 * torch.float32.itemsize
        row_bytes = max(1, self.n_logits) * hidden.element_size()
        return min(n_tokens, max(1, chunk_rows(row_bytes, hidden.device))) * row_bytes

    @contextmanager
    def measuring(self, block: nn.Module, hidden: Tensor) -> Iterator[None]:
        """Enter a context that counts the bytes that a block saves for its backward pass, without its weights.

        At its end, the choice for the pass is made again with the count.
        """
        saved = SavedBytes()
        with saved:
            yield
        self.block_bytes = saved.without(weights_of(block)) * hidden.shape[-1] / hidden.numel()
        self.begin(hidden)


class BlockActivations:
    """Function that transformers calls for one block in place of `torch.utils.checkpoint.checkpoint`."""

    def __init__(self, plan: ActivationPlan, block: nn.Module, index: int) -> None:
        self.plan, self.block, self.index = plan, block, index
        self._again = False

    @property
    def is_selective(self) -> bool:
        """Return True if the block is checkpointed selectively now. The first block never is, because the choice for a
        pass is made only when this block runs.
        """
        return self.plan.way == "selective" and self.index > 0 and not self._again

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block. The plan decides which activations are kept."""
        if torch.compiler.is_compiling():  # a graph holds one way
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.index == 0:
            given = (*args, *kwargs.values(), *getattr(function, "keywords", {}).values())  # bound by transformers
            self.plan.begin(hidden, fused=any(isinstance(argument, LayoutMask) for argument in given))
        if self.plan.block_bytes is None:
            with self.plan.measuring(self.block, hidden) if self.index == 1 else nullcontext():
                return function(*args, **kwargs)
        if self.plan.way == "kept":
            return function(*args, **kwargs)
        if self.is_selective:
            return checkpoint(function, *args, use_reentrant=False, context_fn=selective_contexts, **kwargs)
        place: Any = ActivationOffload(nn.Module(), "host") if hidden.is_cuda else nullcontext()
        with place:
            return checkpoint(self._recomputed(function), *args, use_reentrant=False, **kwargs)

    def _recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that full checkpointing recomputes. While the function runs, `is_selective` is False, even if
        the plan has changed its choice by then.
        """

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._again = self._again, True
            try:
                return function(*args, **kwargs)
            finally:
                self._again = before

        return run
