"""Optimizers by the names of ``TrainingArguments.optim``: one table, which `veneer.optim` fills in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import Trainer, TrainingArguments

from veneer.errors import ConfigError

Choice = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Factory = Callable[[TrainingArguments], Choice]

# Names that veneer serves itself. A name that is not here goes to transformers.
FACTORIES: Mapping[str, Factory] = {}

# Names that transformers serves through bitsandbytes alone.
_BITSANDBYTES = ("bnb_8bit", "adamw_8bit", "paged_", "lion_8bit", "ademamix", "rmsprop_bnb", "lion_32bit")


def choose_optimizer(args: TrainingArguments, model: torch.nn.Module | None) -> Choice:
    """The class and the arguments of the optimizer that ``args.optim`` names.

    Raises ConfigError for a name that needs a package which is not installed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in FACTORIES:
        return FACTORIES[name](args)
    needs_bitsandbytes = any(part in name for part in _BITSANDBYTES)
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        own = ", ".join(sorted(FACTORIES)) or "none"
        raise ConfigError(
            f"optim={name!r} is served by bitsandbytes, which is not installed (served by veneer itself: {own}). "
            "Use optim='adamw_torch', or install bitsandbytes"
        )
    return cast(Choice, Trainer.get_optimizer_cls_and_kwargs(args, model))
