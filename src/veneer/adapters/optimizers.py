"""Optimizers made for LoRA's two factors, under PEFT's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from veneer.contract import MethodConfig
from veneer.errors import ConfigError
from veneer.model.attach.attach import adapted_layers
from veneer.optim.precondition import Factors, precondition

_DAMPING_OF_LORA_FA = 1e-8


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Return an optimizer of the class ``optimizer_cls`` over the trainable parameters. Its steps see LoRA's gradients
    in the metric of ``B A``.

    ``reg`` is added to the diagonals of the two Gram matrices. Other parameters, and factors at embeddings and
    convolutions, are trained as the class trains them. ``kwargs`` are the class's own. Source: Zhang and Pilanci 2024,
    arXiv:2402.02347. Raises ConfigError if no layer trains both factors, or if an update is more than the product of
    the two.
    """
    layers = [each for each in _layers(model) if each.a.requires_grad and each.b.requires_grad]
    if not layers:
        raise ConfigError("no linear layer trains LoRA's A and B: attach LoraConfig first, or use the optimizer alone")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    precondition(optimizer, [Factors(a=each.a, b=each.b) for each in layers], reg)
    return optimizer


def create_lorafa_optimizer(
    model: nn.Module, r: int | None = None, lora_alpha: float | None = None, lr: float = 1e-3, weight_decay: float = 0.0
) -> Optimizer:
    """Freeze LoRA's A, and return AdamW for the other parameters. The gradient of B is projected onto that of ``B A``.

    ``r`` and ``lora_alpha``, which PEFT asks for, must equal the adapters' values; None is always accepted. Source:
    Zhang et al. 2023, arXiv:2308.03303. Raises ConfigError if no layer trains B, if ``r`` or ``lora_alpha`` differs, or
    if an update is more than the product of A and B. Difference from PEFT: torch's AdamW in the parameters' dtype; PEFT
    projects in bfloat16, and decays after a step.
    """
    layers = [each for each in _layers(model) if each.b.requires_grad]
    if not layers:
        raise ConfigError("no linear layer trains LoRA's B: attach LoraConfig first, or use another optimizer")
    given = {"r": r, "lora_alpha": lora_alpha}
    wrong = {
        f"{name}={value} is not the {own} of the adapter: leave it out"
        for method in _methods(model)
        for name, value in given.items()
        if value is not None and value != (own := getattr(method, name))
    }
    if wrong:
        raise ConfigError("; ".join(sorted(wrong)))
    for each in layers:
        each.a.requires_grad_(False)
        each.a.grad = None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, eps=1e-6, weight_decay=weight_decay)
    precondition(optimizer, layers, _DAMPING_OF_LORA_FA)
    return optimizer


def _methods(model: nn.Module) -> list[MethodConfig]:
    """Return the configs of the model's LoRA adapters."""
    held = (layer.method(name) for layer in adapted_layers(model).values() for name in layer.adapters)
    return [method for method in held if hasattr(method, "lora_alpha") and hasattr(method, "r")]


def _layers(model: nn.Module) -> list[Factors]:
    """Return LoRA's factors at linear layers, with the scales of their products.

    Raises ConfigError if an update is not the plain product of A and B.
    """
    found = []
    for path, layer in adapted_layers(model).items():
        for name, held in layer.adapters.items():
            a, b = (held._parameters.get(f"lora_{factor}") for factor in "AB")
            if a is None or b is None or a.ndim != 2 or layer.site((name,)).kind != "linear":
                continue
            pair = layer.record(name).low_rank
            if pair is None or not (pair.is_plain and torch.equal(pair.a, a) and torch.equal(pair.b, b)):
                raise ConfigError(
                    f"the update of {path} by adapter {name!r} is not the product of its A and B alone, which these "
                    "optimizers are for: leave out AdaLoRA, use_bdlora, use_qalora, kasa_config and experts, or use "
                    "another optimizer"
                )
            found.append(Factors(a=a, b=b, scale=pair.scale))
    return found
