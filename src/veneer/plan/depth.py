"""Depths at which a model is traced. Blocks repeat, and memory and work are affine in the number of repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from veneer.ops.traced import tracing
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import KINDS, Shallow
from veneer.plan.model import adapter_of, blockwise, shortened, traced_model
from veneer.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Pattern:
    """Repetition in a model's ``n_blocks`` blocks: first ``lead`` blocks outside of the repetition, then equal groups
    of ``period`` blocks.

    In Llama the lead is 0 and the period 1. In Gemma 3 the period is 6: five blocks with window attention and one with
    full attention. Some mixtures of experts have a lead of dense blocks.
    """

    n_blocks: int
    lead: int
    period: int

    @property
    def depths(self) -> tuple[int, ...]:
        """Return two numbers of blocks, one period apart, at which to trace the model.

        Both models end at the same place of a group as the whole model. If the whole model is not deeper than the
        second depth, return its own depth alone.
        """
        low = self.lead + (self.n_blocks - self.lead) % self.period + self.period
        if low == 1:  # the first block and the last are two: in front of the first no gradient is made
            low += self.period
        return (low, low + self.period) if low + self.period < self.n_blocks else (self.n_blocks,)

    def places(self, n_blocks: int) -> dict[int, list[str]]:
        """Return, for each block of a model of ``n_blocks`` blocks, names that mean the same block at any depth.

        ``first 0`` counts from the front, ``last 0`` from the end.
        """
        found: dict[int, list[str]] = {}
        for k in range(min(self.lead + self.period, n_blocks)):
            found.setdefault(k, []).append(f"first {k}")
        for k in range(min(self.period, n_blocks)):
            found.setdefault(n_blocks - 1 - k, []).append(f"last {k}")
        return found


def pattern_of(recipe: Recipe, config: PreTrainedConfig, n_blocks: int) -> Pattern:
    """Return the repetition in the blocks of a recipe's model.

    If nothing repeats, or if the repetition is unknown, all blocks are one group. Recipes that differ only in their
    batches share one result.
    """
    args = recipe.training_config()
    again = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers") or 1
    parts = recipe.model_dump_json(include={"model", "adapter"})
    return _pattern(_Shape(f"{config.to_json_string(use_diff=False)} {parts}", again, n_blocks, recipe, config))


@dataclass(frozen=True, slots=True)
class _Shape:
    """A model with its adapter, identified by ``text``. Checkpointing recomputes one block in every ``again``."""

    text: str
    again: int
    n_blocks: int
    recipe: Recipe = field(compare=False)
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=16)
def _pattern(shape: _Shape) -> Pattern:
    n_blocks, signs = shape.n_blocks, _signs(shape)
    whole = Pattern(n_blocks, 0, n_blocks)
    if signs is None:
        return whole
    found = (Pattern(n_blocks, _lead(signs, period), period) for period in range(1, n_blocks // 2 + 1))
    best = min(found, key=lambda pattern: pattern.depths[-1], default=whole)
    return best if len(best.depths) > 1 else whole


def _lead(signs: Sequence[object], period: int) -> int:
    """Return the number of the first block from which on every block's sign equals the sign of the block ``period``
    later.
    """
    apart = [k for k in range(len(signs) - period) if signs[k] != signs[k + period]]
    return apart[-1] + 1 if apart else 0


def _signs(shape: _Shape) -> list[object] | None:
    """Return a signature of each block, which is equal for equal blocks. Return None if the model cannot be traced with
    fewer blocks.

    A signature holds the kinds and shapes of the block's parts, its entries in the config's lists, and whether it is
    recomputed.
    """
    text: Any = shape.config.get_text_config()
    if getattr(text, "num_kv_shared_layers", None):
        return None  # the last blocks use keys of earlier ones
    adapter = adapter_of(shape.recipe.adapter)
    if adapter is not None and adapter.counts_layers:
        return None  # a shallow model would have others of them
    try:
        shortened(shape.config, shape.n_blocks - 1)
    except NotImplementedError:
        return None  # its blocks are counted by other fields
    with tracing():
        model = traced_model(shape.config, shape.recipe.model, adapter)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == shape.n_blocks]
    if not lists:
        return None
    settings = [values for _, values in blockwise(text)]
    return [
        (k % shape.again, *(repr(values[k]) for values in settings), *(_sign(blocks[k]) for blocks in lists))
        for k in range(shape.n_blocks)
    ]


def _sign(block: nn.Module) -> tuple[object, ...]:
    tensors = (*block.named_parameters(), *block.named_buffers())
    return (
        *((name, type(module).__name__) for name, module in block.named_modules()),
        *((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors),
    )


def peaks_by_place(shallow: Shallow, pattern: Pattern) -> dict[str, Peak]:
    """Return the peaks of a trace under the names of `Pattern.places`, which hold at any depth. Peaks of blocks in the
    middle are left out.
    """
    places, found = pattern.places(shallow.n_blocks), {}
    for mark, peak in shallow.peaks.items():
        name, _, number = mark.rpartition(".")
        if number.isdigit():
            found.update({f"{name}.{place}": peak for place in places.get(int(number), [])})
        else:
            found[mark] = peak
    return found


def between(low: Peak, high: Peak, more: float) -> Peak:
    """Extrapolate two peaks linearly, kind by kind: ``low`` plus ``more`` times the difference to ``high``.

    No kind is below 0: the peaks may be of moments at which slightly different tensors were alive.
    """
    kinds = {kind: line(low.kinds.get(kind, 0), high.kinds.get(kind, 0), more) for kind in KINDS}
    return Peak({kind: n for kind, n in kinds.items() if n > 0})


def line(low: float, high: float, more: float) -> int:
    """Extrapolate two numbers linearly: ``low`` plus ``more`` times the difference to ``high``, rounded."""
    return round(low + more * (high - low))
