"""Parts of a step into which its ops are counted.

The parts are fused blocks, other blocks, ops that selective checkpointing intercepts, and updates within the backward
pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from veneer.model.fused.block import FusedBlock, halves_now, keywords_of
from veneer.model.fused.decoder import is_fused
from veneer.model.memory.checkpointing import is_selective
from veneer.optim.layerwise import LayerwiseGaLoreAdamW
from veneer.plan.step import blocks
from veneer.plan.work import CountWork


def tell_parts(counted: CountWork, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Install hooks that report to ``counted`` in which part of a step each op runs. Blocks also need `CountWork.mark`.

    A block of which only one half is fused counts as the model's own code, because most of its ops are.
    """
    counted.general = counted.general_outside = not is_fused(model)
    for k, block in enumerate(blocks(model)):
        if isinstance(block, FusedBlock):
            block.register_forward_pre_hook(_tell_path(counted, k), with_kwargs=True)
        if is_selective(block):
            _within(block, "_gradient_checkpointing_func", counted, "watched")
    if isinstance(optimizer, LayerwiseGaLoreAdamW):
        _within(optimizer, "take_gradient", counted, "updating")


def _tell_path(counted: CountWork, k: int) -> Callable[..., None]:
    def hook(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        with counted.paused():  # to look lowers adapters, as the block does itself
            counted.general_blocks[str(k)] = None in halves_now(block, x, keywords_of(block, args[1:], kwargs))

    return hook


def _within(owner: Any, name: str, counted: CountWork, flag: str) -> None:
    """Replace the owner's function ``name`` by one that sets the attribute ``flag`` of ``counted`` to True while it
    runs.
    """
    function = getattr(owner, name)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        setattr(counted, flag, True)
        try:
            return function(*args, **kwargs)
        finally:
            setattr(counted, flag, False)

    setattr(owner, name, run)
