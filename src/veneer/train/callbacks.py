"""Callbacks that the settings of a run ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from veneer.model.checkpointing import checkpoint_selectively
from veneer.train.config import RunSettings
from veneer.train.guards import FiniteGradients
from veneer.train.loss import model_of


def callbacks_of(args: RunSettings) -> Iterator[TrainerCallback | type[TrainerCallback]]:
    """The callbacks that the settings ask for."""
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        yield SelectiveCheckpointing
    if not args.fp16:
        yield FiniteGradients
    if args.early_stopping_patience is not None:
        yield EarlyStoppingCallback(args.early_stopping_patience)


class SelectiveCheckpointing(TrainerCallback):  # type: ignore[misc]
    """Checkpoints selectively where Trainer, at the beginning of `train`, has switched on the full form."""

    def on_train_begin(self, args: RunSettings, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Recompute selectively from here on."""
        checkpoint_selectively(model_of(model), (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1))
