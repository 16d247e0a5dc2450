"""Checks that stop a run before it starts, or before it overwrites a good checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from veneer.errors import ConfigError, DivergedError
from veneer.recipe.distributed_part import OF_DDP
from veneer.train.config import RunSettings
from veneer.train.processes import n_processes


def require_special_tokens(tokenizer: PreTrainedTokenizerBase, args: RunSettings) -> None:
    """Raise ConfigError if a token that ``args`` name is not in the vocabulary, or if there is no token for padding."""
    named = {key: getattr(args, key, None) for key in ("eos_token", "pad_token")}
    unknown = [f"{key}={token!r}" for key, token in named.items() if token and token not in tokenizer.get_vocab()]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: not in the vocabulary of the tokenizer; name tokens that it holds")
    if not any((*named.values(), tokenizer.eos_token, tokenizer.pad_token)):
        raise ConfigError(
            "the tokenizer has neither an end nor a padding token: name one of its vocabulary with eos_token in the "
            "training settings (veneer train --set training.eos_token=...), or set tokenizer.eos_token"
        )


def require_free_groups(args: RunSettings, optimizers: tuple[Any, Any]) -> None:
    """Raise ConfigError if LoRA+ is set and the caller gives an optimizer, because LoRA+ must group the parameters
    itself.
    """
    if args.lora_plus is not None and optimizers[0] is not None:
        raise ConfigError(
            f"lora_plus={args.lora_plus} groups the parameters of an optimizer that the trainer makes, and optimizers "
            "brings one: group it with veneer.optim.lora_plus_groups, or leave one of the two out"
        )


def require_whole_models(trainer: Trainer) -> None:
    """Raise ConfigError if FSDP or DeepSpeed shards the model, because each process must train and write the whole
    model.
    """
    if n_processes() > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            "fsdp and deepspeed are not supported, because checkpoints of a model that they split are not written: "
            "leave them out (torchrun without them trains a whole model in each process)"
        )


def require_settings_of_cut_base(reentrant: bool, args: RunSettings) -> None:
    """Raise ConfigError for settings that do not work with a base sharded over processes."""
    found = ["reentrant checkpointing (set use_reentrant: false)"] * reentrant
    found += [f"{key} (leave it out)" for key in ("activation_offloading", *OF_DDP) if getattr(args, key)]
    if found:
        raise ConfigError(
            f"a base that is sharded over processes cannot be trained with {' and '.join(found)}. Change that, or "
            "train with strategy ddp"
        )


def require_finite(loss: float, step: int) -> None:
    """Raise DivergedError if a loss is NaN or infinite. ``step``, counted from one, is named in the message."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} in step {step}: training stops here, and earlier checkpoints stay. Lower the "
            "learning rate, clip gradients (max_grad_norm), use bf16 in place of fp16, or look at the rows of that "
            "step"
        )


class FiniteGradients(TrainerCallback):  # type: ignore[misc]
    """Callback that ends the run before an optimizer step that would put NaN or infinity into the weights.

    It is not installed under float16, where the gradient scaler skips such steps itself.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Raise DivergedError if any gradient is not finite."""
        model: nn.Module = context["model"]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # The largest magnitude, which NaN and infinity alone can make infinite; gradients may lie on several devices.
        if not torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite():
            raise DivergedError(
                f"a gradient is NaN or infinite in step {state.global_step + 1}: training stops before it reaches the "
                "weights, and earlier checkpoints stay. Lower the learning rate, or use bf16 or fp32"
            )
