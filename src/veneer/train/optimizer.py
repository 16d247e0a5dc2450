"""Optimizers by the names of ``TrainingArguments.optim``: those that veneer serves itself, in one table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import Trainer, TrainingArguments

from veneer.errors import ConfigError
from veneer.optim import AdamW8bit, PagedAdamW8bit

Choice = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Factory = Callable[[TrainingArguments], Choice]


def _adamw(optimizer: type[torch.optim.Optimizer]) -> Factory:
    def choose(args: TrainingArguments) -> Choice:
        betas = (args.adam_beta1, args.adam_beta2)
        return optimizer, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}

    return choose


# A name that is not here goes to transformers.
FACTORIES: Mapping[str, Factory] = {
    "adamw_8bit": _adamw(AdamW8bit),
    "adamw_bnb_8bit": _adamw(AdamW8bit),
    "paged_adamw_8bit": _adamw(PagedAdamW8bit),
}

# Names that transformers serves through bitsandbytes alone.
_BITSANDBYTES = ("paged_", "lion_8bit", "lion_32bit", "ademamix", "rmsprop_bnb")


def choose_optimizer(args: TrainingArguments, model: torch.nn.Module | None) -> Choice:
    """The class and the arguments of the optimizer that ``args.optim`` names.

    Raises ConfigError for a name that needs a package which is not installed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in FACTORIES:
        return FACTORIES[name](args)
    if any(part in name for part in _BITSANDBYTES) and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim={name!r} is served by bitsandbytes, which is not installed. Use one that veneer serves itself "
            f"({', '.join(sorted(FACTORIES))}) or one of torch's (adamw_torch), or install bitsandbytes"
        )
    return cast(Choice, Trainer.get_optimizer_cls_and_kwargs(args, model))
