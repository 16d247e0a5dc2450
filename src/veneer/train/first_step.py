"""Recognizes a first step that does not change the model: under a warm-up its learning rate is 0."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.schedules import has_schedule


def changes_nothing(optimizer: Any, model: nn.Module) -> bool:
    """Return True if the optimizer's next step has learning rate 0, and no active adapter changes itself
    between steps.
    """
    groups = getattr(optimizer, "param_groups", ())
    acts = isinstance(model, PeftModel) and has_schedule(model.adapter_state)
    return bool(groups) and all(group["lr"] == 0 for group in groups) and not acts


def evaluates_first(args: Any, state: Any, optimizer: Any = None, model: Any = None, **_: Any) -> bool:
    """Return True if the run evaluates on the held-out rows before its first step. Called when training begins."""
    begins = bool(getattr(args, "eval_on_start", False)) and not state.global_step
    return begins and not changes_nothing(optimizer, model)
