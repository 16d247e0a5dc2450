"""Prevents or undoes unwanted changes by TRL, Trainer and accelerate to a model and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.train.config import RunSettings


@contextmanager
def model_kept(model: PreTrainedModel) -> Iterator[None]:
    """Enter a context after which TRL's changes of the model are undone: trained weights are float32 again, and
    ``forward`` is the model's own.

    TRL rounds adapters on quantized bases to bfloat16 before the first step. It also replaces the forward pass by one
    that reads ``lm_head.weight`` directly, past an adapter on the head. Trainer sets ``use_cache`` to False in the
    config; this is undone too, because veneer sets it in each forward pass.
    """
    use_cache = getattr(model.config, "use_cache", None)
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    forward = vars(model).get("forward")
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in kept and kept[name].is_floating_point():
                dtype = torch.float32 if kept[name].dtype in (torch.float16, torch.bfloat16) else kept[name].dtype
                parameter.data = kept[name].to(device=parameter.device, dtype=dtype)
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        model.config.use_cache = use_cache


@contextmanager
def settings_kept(args: RunSettings) -> Iterator[None]:
    """Enter a context that hides from TRL the settings that veneer implements itself.

    TRL would use its own selective checkpointing and offload. It would also refuse chat templates without generation
    markers, which veneer does not need, because it finds the assistant's tokens by their positions.
    """
    names = [n for n in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs") if hasattr(args, n)]
    switches = [n for n in ("activation_offloading", "assistant_only_loss") if hasattr(args, n)]
    kept = {name: getattr(args, name) for name in (*names, *switches)}
    for name in switches:
        setattr(args, name, False)
    for name in names:
        setattr(args, name, {key: v for key, v in (kept[name] or {}).items() if key != "selective"} or None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def unwrap_forward(model: nn.Module) -> None:
    """Undo the change of a model's forward by accelerate's ``prepare_model``."""
    # Not by accelerate's own means: they also strip the decorators that transformers puts on forward.
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original
