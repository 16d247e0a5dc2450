"""Checks that an adapted model can train: something is trainable, and gradients reach it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.errors import TrainingError


def require_something_to_train(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check a call of the model's forward, as its pre-hook: a training step must have trainable parameters.

    Raises TrainingError if labels are given in training mode and every parameter is frozen.
    """
    if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
        return
    if kwargs.get("labels") is not None and not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "every parameter of this model is frozen, so training would change nothing. Adapters load frozen: load "
            "them with is_trainable=True, or call model.set_requires_grad(adapter_name), before training"
        )


def let_gradients_through_checkpoints(model: Any) -> None:
    """Make the embeddings' output require a gradient if activations are checkpointed.

    Otherwise the re-entrant checkpoint passes no gradient on, because no input of a block requires one if the base is
    frozen.
    """
    if _checkpoints(model) and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
