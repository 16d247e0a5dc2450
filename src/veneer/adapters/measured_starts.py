"""Starts of LoRA's factors that are measured on the model: LoRA-GA's on gradients, CorDA's on inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from veneer.adapters.merging import require_known
from veneer.adapters.peft_model import PeftModel
from veneer.contract.late_start import LateStart
from veneer.errors import AdapterNameError, ConfigError, DataError, NonFiniteError
from veneer.inits import Factors
from veneer.inits.corda import CordaConfig, covariance, of_covariance
from veneer.inits.lora_ga import LoraGAConfig, of_gradient
from veneer.model.attach import adapted_layers
from veneer.model.holder import tensors_of
from veneer.model.linear import AdaptedSite
from veneer.model.structure import evaluation, modes_kept

Settings = TypeVar("Settings")


def initialize_lora_ga_weights(
    model: PeftModel, train_step: Callable[[], object], adapter_name: str = "default"
) -> None:
    """Initialise an adapter with ``init_lora_weights="lora_ga"`` from the gradients of its linear layers' weights.

    ``train_step`` runs the model forward and backward, on one batch or several; the gradients are their mean. In it no
    adapter acts, the model is in training mode, and the base may have any storage format. The gradients need as much
    memory as the adapted weights in float32.

    Raises ConfigError if the adapter does not start from "lora_ga", or a weight has too few directions for its rank.
    Raises DataError for a layer that gets no gradient, NonFiniteError for gradients with NaN or infinity, and
    AdapterNameError if an adapter is merged.
    """
    start, settings, layers = _asked_for(model, adapter_name, LoraGAConfig)
    sums = {path: _Sum() for path in layers}
    with model.disable_adapter(), modes_kept(model), torch.enable_grad(), _gradients_of(layers, sums):
        model.train()
        train_step()
    with torch.no_grad():
        for path, layer in layers.items():
            gradient, site = sums[path].mean(path, "gradient", "train_step"), layer.site((adapter_name,))
            factors = of_gradient(site, gradient, (start.rank(site), start.scale(site)), settings)
            _put(layer.adapters[adapter_name], start, factors)


@torch.no_grad()
def initialize_lora_corda_weights(
    model: PeftModel, run_model: Callable[[], object], adapter_name: str = "default"
) -> None:
    """Initialise an adapter with ``init_lora_weights="corda"`` from its linear layers' weights and inputs.

    ``run_model`` runs the model forward, on one batch or several. In it no adapter acts, the model is in evaluation
    mode, and the base may have any storage format. The covariances need ``i²`` numbers in float32 for each layer.

    Raises ConfigError if the adapter does not start from "corda", DataError for a layer that no batch reaches,
    NonFiniteError for inputs with NaN or infinity, and AdapterNameError if an adapter is merged.
    """
    start, settings, layers = _asked_for(model, adapter_name, CordaConfig)
    sums = {path: _Sum() for path in layers}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        sums[cast(AdaptedSite, module).site_name].add(covariance(args[0]))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    try:
        with model.disable_adapter(), evaluation(model):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    for path, layer in layers.items():
        inputs, site = sums[path].mean(path, "input", "run_model"), layer.site((adapter_name,))
        factors = of_covariance(site, inputs, (start.rank(site), start.scale(site)), settings)
        _put(layer.adapters[adapter_name], start, factors)


@dataclass
class _Sum:
    """Sum of matrices, and their count."""

    total: Tensor | None = None
    count: int = 0

    def add(self, value: Tensor) -> None:
        self.total, self.count = value if self.total is None else self.total.add_(value), self.count + 1

    def mean(self, path: str, what: str, given: str) -> Tensor:
        """Raises DataError if there are none, and NonFiniteError if the sum is not finite."""
        if self.total is None:
            raise DataError(f"{given} gave {path} no {what}: leave it out of target_modules, or run the model in it")
        if not torch.isfinite(self.total).all():
            raise NonFiniteError(
                f"the {what} of {path} holds NaN or infinity, from which nothing can start: look for the batch, or for "
                "a dtype too narrow for this model"
            )
        return self.total / self.count


@contextmanager
def _gradients_of(layers: Mapping[str, AdaptedSite], sums: Mapping[str, _Sum]) -> Iterator[None]:
    """Context in which each backward pass adds the gradients of the layers' weights, which stay frozen."""

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # of a checkpointed block, which runs again
            return None
        x, own = args[0].detach(), sums[cast(AdaptedSite, module).site_name]
        watched = output + output.new_zeros(()).requires_grad_()  # gets a gradient though nothing below trains
        cast(Any, watched).register_hook(lambda grad: own.add(_product(grad, x)))
        return watched

    handles = [layer.register_forward_hook(watch) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _product(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight (o, i), of one use of it: that of the outputs, and the inputs."""
    return gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()


def _asked_for(model: PeftModel, name: str, kind: type[Settings]) -> tuple[LateStart, Settings, dict[str, AdaptedSite]]:
    """The start that an adapter asks for, its settings of this kind, and the linear layers that have it."""
    require_known(model.adapter_state, (name,))
    if model.adapter_state.merged:
        raise AdapterNameError(f"{list(model.adapter_state.merged)} are merged: call unmerge_adapter() before a start")
    start = model.peft_config[name].late_start
    if start is None or not isinstance(start.settings, kind):
        raise ConfigError(
            f"{name!r} does not start from {kind.__name__}: it is {type(model.peft_config[name]).__name__} with "
            f"init_lora_weights={getattr(model.peft_config[name], 'init_lora_weights', None)!r}"
        )
    layers = {path: m for path, m in adapted_layers(model).items() if m.takes_rows and name in m.adapters}
    if not layers:
        raise ConfigError(f"{kind.__name__} starts the factors of linear layers; {name!r} adapts none")
    return start, start.settings, layers


def _put(held: nn.Module, start: LateStart, factors: Factors) -> None:
    """The factors into one layer's parameters, and into the product that is subtracted."""
    parameters = tensors_of(held)
    for names, value in zip(((start.a, *start.taken_off[:1]), (start.b, *start.taken_off[1:])), factors, strict=True):
        for name in names:
            parameters[name].copy_(value)
