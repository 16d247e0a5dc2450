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
    """Raise ConfigError if a token that ``args`` name is not in the vocabulary, or no token can pad."""
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
    """Raise ConfigError if LoRA+ would have to group the parameters of an existing optimizer."""
    if args.lora_plus is not None and optimizers[0] is not None:
        raise ConfigError(
            f"lora_plus={args.lora_plus} groups the parameters of an optimizer that the trainer makes, and optimizers "
            "brings one: group it with veneer.optim.lora_plus_groups, or leave one of the two out"
        )


def require_whole_models(trainer: Trainer) -> None:
    """Raise ConfigError if several processes split the model: each must train, and write, a whole one."""
    if n_processes() > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            "several processes train with a whole model each (torchrun without more settings); checkpoints of models "
            "that FSDP or DeepSpeed has split are not written: leave fsdp and deepspeed out"
        )


def require_settings_of_cut_base(reentrant: bool, args: RunSettings) -> None:
    """Raise ConfigError for settings under which the base cannot be sharded over processes."""
    found = ["reentrant checkpointing (set use_reentrant: false)"] * reentrant
    found += [f"{key} (leave it out)" for key in ("activation_offloading", *OF_DDP) if getattr(args, key)]
    if found:
        raise ConfigError(
            f"a base that is cut over processes does not go with {' and '.join(found)}; or train with strategy ddp"
        )


def require_finite(loss: float, step: int) -> None:
    """Raise DivergedError for a loss that is NaN or infinite, with its step (counted from one)."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} in step {step}: training stops here, and earlier checkpoints stay. Lower the "
            "learning rate, clip gradients (max_grad_norm), use bf16 in place of fp16, or look at the rows of that "
            "step"
        )


class FiniteGradients(TrainerCallback):  # type: ignore[misc]
    """Callback that stops before an optimizer step that would put NaN or infinity into the weights.

    Under float16 the gradient scaler skips such steps itself; then this callback is not installed.
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
