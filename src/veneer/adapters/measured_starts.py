"""Initial values of LoRA's factors that are computed from data: LoRA-GA's from gradients, CorDA's from inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from veneer.adapters.merging import require_known
from veneer.adapters.peft_model import PeftModel
from veneer.contract.late_start import LateStart
from veneer.errors import AdapterNameError, ConfigError, DataError, NonFiniteError
from veneer.inits import Factors, weight_problems
from veneer.inits.corda import CordaConfig, covariance, of_covariance
from veneer.inits.lora_ga import LoraGAConfig, of_gradient, rank_problems
from veneer.model.adapted.holder import tensors_of
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.attach.attach import adapted_layers
from veneer.model.sites.structure import evaluation, modes_kept
from veneer.records.sites import LinearSite

Settings = TypeVar("Settings")
NAMES_TOLD = 4  # of layers with one problem


def initialize_lora_ga_weights(
    model: PeftModel, train_step: Callable[[], object], adapter_name: str = "default"
) -> None:
    """Initialise an adapter with ``init_lora_weights="lora_ga"`` from the gradients of its linear layers' weights.

    ``train_step`` runs the model forward and backward, on one batch or several; the mean of their gradients is used.
    While it runs, no adapter acts and the model is in training mode. The base may have any storage format. The
    gradients need as much memory as the adapted weights in float32.

    Raises ConfigError before the pass, if the adapter does not start from "lora_ga" or weights have too few directions
    for its ranks. Raises DataError for layers that get no gradient, NonFiniteError for gradients with NaN or infinity,
    and AdapterNameError if an adapter is merged. After an error the adapter is unchanged.
    """
    start, settings, layers = _asked_for(model, adapter_name, LoraGAConfig)
    sites = {path: layer.site((adapter_name,)) for path, layer in layers.items()}
    _require_fit([problem for site in sites.values() for problem in rank_problems(site, start.rank(site))])
    sums = {path: _Sum() for path in layers}
    with model.disable_adapter(), modes_kept(model), torch.enable_grad(), _gradients_of(layers, sums):
        model.train()
        train_step()
    _require_measured(sums, "gradient", "train_step")

    def measured(path: str, site: LinearSite) -> Factors:
        return of_gradient(site, sums[path].mean, (start.rank(site), start.scale(site)), settings)

    with torch.no_grad():
        factors = {path: measured(path, site) for path, site in sites.items()}
        _put({path: layer.adapters[adapter_name] for path, layer in layers.items()}, start, factors)


@torch.no_grad()
def initialize_lora_corda_weights(
    model: PeftModel, run_model: Callable[[], object], adapter_name: str = "default"
) -> None:
    """Initialise an adapter with ``init_lora_weights="corda"`` from its linear layers' weights and inputs.

    ``run_model`` runs the model forward, on one batch or several. While it runs, no adapter acts and the model is in
    evaluation mode. The base may have any storage format. The covariances need ``i²`` numbers in float32 for each
    layer.

    Raises ConfigError before the pass, if the adapter does not start from "corda" or weights are too small for its
    ranks. Raises DataError for layers that no batch reaches or whose largest input in a pass is 0, NonFiniteError for
    inputs with NaN or infinity, and AdapterNameError if an adapter is merged. After an error the adapter is unchanged.
    """
    start, settings, layers = _asked_for(model, adapter_name, CordaConfig)
    sites = {path: layer.site((adapter_name,)) for path, layer in layers.items()}
    _require_fit([problem for site in sites.values() for problem in weight_problems(site, start.rank(site), "CorDA")])
    sums = {path: _Sum() for path in layers}
    flat: set[str] = set()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        path, x = cast(AdaptedSite, module).site_name, args[0]
        if x.numel() == 0:  # of an expert without tokens
            return
        if x.max() == 0:
            flat.add(path)
        else:
            sums[path].add(covariance(x))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    try:
        with model.disable_adapter(), evaluation(model):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    if flat:
        raise DataError(
            f"the largest input in a pass of run_model is 0 at {_told([path for path in layers if path in flat])}, and "
            "CorDA divides by it: leave these layers out of target_modules, or give other batches"
        )
    _require_measured(sums, "input", "run_model")

    def measured(path: str, site: LinearSite) -> Factors:
        return of_covariance(site, sums[path].mean, (start.rank(site), start.scale(site)), settings)

    factors = {path: measured(path, site) for path, site in sites.items()}
    _put({path: layer.adapters[adapter_name] for path, layer in layers.items()}, start, factors)


@dataclass
class _Sum:
    """A sum of matrices with the number of summands."""

    total: Tensor | None = None
    count: int = 0

    def add(self, value: Tensor) -> None:
        self.total, self.count = value if self.total is None else self.total.add_(value), self.count + 1

    @property
    def is_finite(self) -> bool:
        return self.total is not None and bool(torch.isfinite(self.total).all())

    @property
    def mean(self) -> Tensor:
        """Return the mean; there is at least one matrix."""
        return cast(Tensor, self.total) / self.count


def _require_fit(problems: Sequence[str]) -> None:
    """Raise ConfigError with all ``problems``, the reasons why layers cannot have their ranks. Do nothing if there are
    none.
    """
    if problems:
        raise ConfigError(_told(problems, "; "))


def _require_measured(sums: Mapping[str, _Sum], what: str, given: str) -> None:
    """Raise DataError for layers that no data reached, and NonFiniteError for sums that are not finite."""
    missing = [path for path, own in sums.items() if not own.count]
    if missing:
        raise DataError(
            f"{given} gave no {what} to {_told(missing)}: leave these layers out of target_modules, or run the model "
            f"in {given}"
        )
    wrong = [path for path, own in sums.items() if not own.is_finite]
    if wrong:
        raise NonFiniteError(
            f"the {what} holds NaN or infinity at {_told(wrong)}, from which nothing can start: look for the batch, or "
            "for a dtype too narrow for this model"
        )


def _told(each: Sequence[str], between: str = ", ") -> str:
    """Return the first few names as text, with the number of the remaining ones."""
    more = len(each) - NAMES_TOLD
    return between.join(each[:NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _gradients_of(layers: Mapping[str, AdaptedSite], sums: Mapping[str, _Sum]) -> Iterator[None]:
    """Enter a context in which each backward pass adds the gradients of the layers' weights, which stay frozen."""

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
    """Return a weight's gradient (o, i) from one use of it: from the gradient of its outputs, and its inputs."""
    return gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()


def _asked_for(model: PeftModel, name: str, kind: type[Settings]) -> tuple[LateStart, Settings, dict[str, AdaptedSite]]:
    """Return an adapter's initialization from data, its settings of class ``kind``, and its linear layers by path."""
    require_known(model.adapter_state, (name,))
    if model.adapter_state.merged:
        merged = list(model.adapter_state.merged)
        raise AdapterNameError(f"the adapters {merged} are merged: call unmerge_adapter() before a start from data")
    start = model.peft_config[name].late_start
    if start is None or not isinstance(start.settings, kind):
        raise ConfigError(
            f"{name!r} does not start from {kind.__name__}: it is {type(model.peft_config[name]).__name__} with "
            f"init_lora_weights={getattr(model.peft_config[name], 'init_lora_weights', None)!r}. Give it to "
            "LoraConfig(init_lora_weights=…), or leave this start out"
        )
    layers = {path: m for path, m in adapted_layers(model).items() if m.takes_rows and name in m.adapters}
    if not layers:
        raise ConfigError(
            f"{kind.__name__} starts the factors of linear layers; {name!r} adapts none. Name linear layers in "
            "target_modules"
        )
    return start, start.settings, layers


def _put(held: Mapping[str, nn.Module], start: LateStart, factors: Mapping[str, Factors]) -> None:
    """Write the factors into each layer's parameters. If the initial product is subtracted from the base, write them
    into its parameters too.
    """
    both = (start.a, *start.taken_off[:1]), (start.b, *start.taken_off[1:])
    for path, own in factors.items():
        parameters = tensors_of(held[path])
        for names, value in zip(both, own, strict=True):
            for name in names:
                parameters[name].copy_(value)
