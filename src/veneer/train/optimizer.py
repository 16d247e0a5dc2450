"""Optimizers by the names of ``TrainingArguments.optim``: those of veneer itself, in one table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from veneer.errors import ConfigError
from veneer.model.attach.attach import embedding_parameters, module_index, outward_parameters
from veneer.optim import AdamW8bit, GaLoreAdamW, LayerwiseGaLoreAdamW, PagedAdamW8bit, lora_plus_groups
from veneer.optim.galore import GaLoreProjection
from veneer.recipe.key_checks import perhaps
from veneer.recipe.optimizers import optim_name, steps_in_backward

Choice = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Factory = Callable[[TrainingArguments, "nn.Module | None"], Choice]

# The names that GaLore's settings have in ``optim_args``: ours, and transformers' for the same.
_GALORE_KEYS = {"rank": "rank", "gap": "gap", "update_proj_gap": "gap", "scale": "scale", "side": "side"}


def _adamw(optimizer: type[torch.optim.Optimizer]) -> Factory:
    return lambda args, model: (optimizer, _adam_settings(args))


def _galore(optimizer: type[GaLoreAdamW], eight_bit: bool = False) -> Factory:
    def choose(args: TrainingArguments, model: nn.Module | None) -> Choice:
        settings = {**_adam_settings(args), "projection": galore_projection(args.optim_args), "eight_bit": eight_bit}
        return optimizer, settings if model is None else {"params": galore_groups(args, model), **settings}

    return choose


# A name that is not here goes to transformers.
FACTORIES: Mapping[str, Factory] = {
    "adamw_8bit": _adamw(AdamW8bit),
    "adamw_bnb_8bit": _adamw(AdamW8bit),
    "paged_adamw_8bit": _adamw(PagedAdamW8bit),
    "galore_adamw": _galore(GaLoreAdamW),
    "galore_adamw_8bit": _galore(GaLoreAdamW, eight_bit=True),
    "galore_adamw_layerwise": _galore(LayerwiseGaLoreAdamW),
    "galore_adamw_8bit_layerwise": _galore(LayerwiseGaLoreAdamW, eight_bit=True),
}

# Names whose ``optim_args`` transformers does not read.
_WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")

# Names that transformers serves through bitsandbytes alone.
_BITSANDBYTES = ("paged_", "lion_8bit", "lion_32bit", "ademamix", "rmsprop_bnb")


def choose_optimizer(args: TrainingArguments, model: nn.Module | None) -> Choice:
    """Return the class and the arguments of the optimizer that ``args.optim`` names.

    Raises ConfigError for a name whose package is not installed.
    """
    name = optim_name(args.optim)
    if name in FACTORIES:
        return FACTORIES[name](args, model)
    if any(part in name for part in _BITSANDBYTES) and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim={name!r} is served by bitsandbytes, which is not installed. Use one that veneer serves itself "
            f"({', '.join(sorted(FACTORIES))}) or one of torch's (adamw_torch), or install bitsandbytes"
        )
    return cast(Choice, Trainer.get_optimizer_cls_and_kwargs(args, model))


def lora_plus_optimizer(args: TrainingArguments, model: nn.Module, ratio: float, choice: Choice) -> Any:
    """Return the chosen optimizer with LoRA+'s parameter groups. Raises ConfigError if it defines groups of its own."""
    optimizer, settings = choice
    if {"params", "model", "optimizer_dict"} & settings.keys():
        raise ConfigError(
            f"lora_plus={ratio} groups the factors of adapters, and optim={optim_name(args.optim)!r} has groups of its "
            "own: use another optimizer, or leave lora_plus out"
        )
    groups = lora_plus_groups(
        model.named_parameters(), args.learning_rate, ratio, args.weight_decay,
        outward=outward_parameters(model), embeddings=embedding_parameters(model),
    )  # fmt: skip
    return optimizer(groups, **settings)


def galore_groups(args: TrainingArguments, model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of trained parameters: matrices of the layers that GaLore projects, other matrices, and vectors.

    Vectors have no weight decay. ``args.optim_target_modules`` chooses the layers as in transformers, by parts of their
    paths or regular expressions. None and "all-linear" mean all linear layers except the output head. Raises
    ConfigError if no layer matches.
    """
    wanted, linear = args.optim_target_modules, module_index(model).all_linear
    if wanted not in (None, "all-linear"):
        linear = tuple(path for path in linear if check_target_module_exists(wanted, path))
        if not linear:
            raise ConfigError(
                f"optim_target_modules={wanted!r} matches no linear layer of the model. Name layers of it, such as "
                "q_proj"
            )
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    weights = {f"{path}.weight" for path in linear}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name in weights, args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
    return [{"params": ps, "projected": on, "weight_decay": decay} for (on, decay), ps in groups.items()]


def galore_projection(optim_args: str | None) -> GaLoreProjection:
    """Parse ``optim_args``, such as ``"rank=64, update_proj_gap=100, scale=0.25"``. Raises ConfigError for an unknown
    key or a value that is not a number.
    """
    given: dict[str, Any] = {}
    for part in (optim_args or "").replace(" ", "").split(","):
        key, equals, text = part.partition("=")
        if not part:
            continue
        if not equals or key not in _GALORE_KEYS:
            allowed = ", ".join(f"{name}=…" for name in _GALORE_KEYS)
            raise ConfigError(f"optim_args: {part!r} is not one of GaLore's {allowed}{perhaps(key, _GALORE_KEYS)}")
        try:
            given[_GALORE_KEYS[key]] = text if key == "side" else float(text) if key == "scale" else int(text)
        except ValueError as error:
            raise ConfigError(f"optim_args: {key}={text!r} must be a number") from error
    return GaLoreProjection(**given)


def require_known(optim: Any) -> None:
    """Raise ConfigError, with the nearest known name, if ``optim`` is not an optimizer's name."""
    name, known = optim_name(optim), {*FACTORIES, *(each.value for each in OptimizerNames)}
    if name not in known:
        raise ConfigError(
            f"optim={name!r} is unknown: give one of veneer's own ({', '.join(sorted(FACTORIES))}), or of "
            f"transformers' OptimizerNames{perhaps(name, known)}"
        )


def optimizer_problems(args: TrainingArguments) -> list[str]:
    """Return the problems of arguments that do not go with the optimizer they name."""
    name, found = optim_name(args.optim), list[str]()
    if "galore" in name and name in FACTORIES:
        try:
            galore_projection(args.optim_args)
        except ConfigError as error:
            found.append(str(error))
    elif args.optim_args and (name in FACTORIES or name in _WITHOUT_ARGS):
        found.append(f"optim_args={args.optim_args!r} has no effect with optim={name!r}: leave it out")
    if args.optim_target_modules and not any(part in name for part in ("galore", "apollo")):
        found.append(
            f"optim_target_modules={args.optim_target_modules!r} has no effect with optim={name!r}: leave it out"
        )
    if steps_in_backward(name):
        settings = {
            "max_grad_norm": (args.max_grad_norm, 0),
            "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1),
            "fp16": (args.fp16, False),
            "the number of processes": (args.world_size, 1),
        }
        found += [
            f"optim={name!r} updates weights within the backward pass, so {what} must be {only!r}, not {value!r}"
            for what, (value, only) in settings.items()
            if value != only and value is not None
        ]
    return found


def _adam_settings(args: TrainingArguments) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
