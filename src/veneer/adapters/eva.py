"""EVA on a model: passes over data give the directions of LoRA's factors and the rank of each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapters.merging import require_known
from veneer.adapters.peft_model import PeftModel
from veneer.contract.late_start import LateStart
from veneer.errors import AdapterNameError, ConfigError, DataError, NonFiniteError, ShapeError
from veneer.inits.eva import Directions, EvaConfig, shared_ranks, updated
from veneer.model.adapted.linear import AdaptedSite, device_of
from veneer.model.adapted.site import restore
from veneer.model.attach.attach import adapted_layers
from veneer.model.sites.structure import evaluation

MAX_PASSES = 50
Batch = Mapping[str, Any]
Forward = Callable[[nn.Module, Batch], Any]
See = Callable[[str, Tensor, Tensor | None], object]


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(**batch)


@torch.no_grad()
def get_eva_state_dict(
    model: PeftModel,
    dataloader: Iterable[Batch],
    adapter_name: str = "default",
    *,
    forward_fn: Forward = _forward,
) -> dict[str, Tensor]:
    """Return the factor A (r, i) of each linear layer of an adapter, by path, with EVA's rank. A rank may be 0.

    The batches run through the base model alone, in evaluation mode, pass after pass, until the directions converge.
    Rows of a layer's input count if ``attention_mask`` keeps them and, with ``use_label_mask``, ``labels`` too. If the
    mask does not fit an input (routed tokens, an encoder with a decoder), all its rows count.

    Raises ConfigError if the adapter does not start from "eva", or if the directions do not converge in `MAX_PASSES`.
    Raises DataError if the loader is empty, or gives a layer no rows or too few rows in every batch. Raises
    NonFiniteError for inputs with NaN or infinity.
    """
    (start, eva), layers = _start(model, adapter_name), _layers(model, adapter_name)
    with model.disable_adapter(), evaluation(model):
        passes = _Passes(model, dataloader, eva, forward_fn)
        groups = passes.groups(layers)
        ranks = {path: start.rank(layer.site((adapter_name,))) for path, layer in layers.items()}
        for group in groups:
            widest = max(round(ranks[path] * eva.rho) for path in group.paths)
            group.n_directions = min(widest, layers[group.paths[0]].site(()).in_features)
        given = passes.settle(groups, sum(ranks.values()))
    of = {path: cast(Directions, group.found) for group in groups for path in group.paths}
    return {path: of[path].start(given[path], eva.whiten) for path in layers}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Batch] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    *,
    forward_fn: Forward = _forward,
    adapter_name: str = "default",
) -> None:
    """Initialise an adapter with ``init_lora_weights="eva"`` from data: A from `get_eva_state_dict`, B zero.

    ``eva_state_dict`` replaces the passes over ``dataloader``. Layers of rank 0 lose the adapter, and the config then
    lists the remaining layers with their rank and alpha. Layers that are not linear, or not in ``eva_state_dict``, keep
    their start.

    Call it before the optimizer is made: parameters whose rank changes are new ones.

    Raises as `get_eva_state_dict` does, and AdapterNameError if an adapter is merged. Raises ConfigError without data,
    or if no layer would keep a rank. Raises ShapeError for factors that fit no layer.
    """
    (start, eva), layers = _start(model, adapter_name), _layers(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("EVA starts from data: give a dataloader, or an eva_state_dict made from one")
        eva_state_dict = get_eva_state_dict(model, dataloader, adapter_name, forward_fn=forward_fn)
    _require_fitting(eva_state_dict, layers)
    factors = {path: eva_state_dict[path] for path in layers if path in eva_state_dict}
    sites = {p: m.site((adapter_name,)) for p, m in adapted_layers(model).items() if adapter_name in m.adapters}
    ranks = {path: factors[path].shape[0] if path in factors else start.rank(site) for path, site in sites.items()}
    if not any(ranks.values()):
        raise ConfigError(
            f"eva_state_dict leaves none of the layers of {adapter_name!r} a rank: give a factor with at least one row"
        )
    changed = start.with_ranks(sites, ranks, eva.adjust_scaling_factors)
    started = replace(model.peft_config[adapter_name], **changed)  # type: ignore[arg-type]
    for path, a in factors.items():
        if a.shape[0]:
            _put(layers[path].adapters[adapter_name], start, a)
        else:
            _remove(layers[path], adapter_name, with_bias=started.extras.biases == "adapted")
    model.adapter_state.configs[adapter_name] = started


@dataclass
class _Group:
    """Layers that read the same input. Only the first one's input is observed; ``found`` improves with each batch."""

    paths: list[str]
    layer: AdaptedSite
    n_directions: int = 0
    found: Directions | None = None


@dataclass
class _Passes:
    """Passes over the batches of a loader, through the model."""

    model: nn.Module
    loader: Iterable[Batch]
    eva: EvaConfig
    forward: Forward
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)

    def groups(self, layers: Mapping[str, AdaptedSite]) -> list[_Group]:
        """Group the layers by their inputs: layers whose inputs in the first batch are equal form one group."""
        first = next(iter(self.loader), None)
        if first is None:
            raise DataError(
                "the dataloader gave no batch: give at least one, since EVA starts from the inputs of the layers"
            )
        seen: dict[str, tuple[torch.Size, str]] = {}
        self._watch(first, layers, lambda path, x, mask: seen.setdefault(path, _digest(x)))
        missed = [path for path in layers if path not in seen]
        if missed:
            raise DataError(f"the first batch reached none of {missed}: leave them out of target_modules, or give data")
        same: dict[tuple[torch.Size, str], list[str]] = {}
        for path in layers:
            same.setdefault(seen[path], []).append(path)
        return [_Group(paths, layers[paths[0]]) for paths in same.values()]

    def settle(self, groups: list[_Group], budget: int) -> dict[str, int]:
        """Read batches until all directions that are kept have converged. Return the rank of each layer by path.

        The ranks of all layers share ``budget``. Raises ConfigError if the directions have not converged after
        `MAX_PASSES`.
        """
        ranks = {path: group.n_directions for group in groups for path in group.paths}
        for batch in self._batches(groups):
            waiting = {group.paths[0]: group for group in groups if not self._has_settled(group, ranks)}
            if not waiting:
                return ranks
            self._watch(batch, {path: group.layer for path, group in waiting.items()}, _adding(waiting))
            if all(group.found is not None for group in groups):
                ranks = _ranks(groups, budget)
        raise ConfigError(
            f"after {MAX_PASSES} passes over the data the directions of EVA still turn by more than tau={self.eva.tau} "
            "allows: give a lower tau, or more data"
        )

    def _batches(self, groups: list[_Group]) -> Iterator[Batch]:
        for _ in range(MAX_PASSES):
            n_batches = 0
            for batch in self.loader:
                n_batches += 1
                yield batch
            short = [g for g in groups if g.found is None]
            if not n_batches:
                raise DataError("the dataloader gave batches once only: EVA needs one that can be gone through again")
            if short:
                raise DataError(
                    f"no batch gives {short[0].paths[0]} {short[0].n_directions} tokens, one for each direction. Make "
                    "batches larger, r or rho smaller, or set use_label_mask=False if labels mask most tokens."
                )

    def _has_settled(self, group: _Group, ranks: Mapping[str, int]) -> bool:
        needed = max(ranks[path] for path in group.paths)
        return group.found is not None and bool(group.found.settled(self.eva.tau)[:needed].all())

    def _watch(self, batch: Batch, layers: Mapping[str, AdaptedSite], see: See) -> None:
        """Run one forward pass. It calls ``see`` with each layer's path, its input, and the mask of the positions that
        count.
        """
        moved = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        mask = _mask(moved, self.eva)

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(cast(AdaptedSite, module).site_name, args[0], mask)

        handles = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
        try:
            self.forward(self.model, moved)
        finally:
            for handle in handles:
                handle.remove()


def _adding(groups: Mapping[str, _Group]) -> See:
    """Return a function that adds a layer's input rows to its group. A batch with fewer rows than the group has
    directions is skipped.
    """

    def add(path: str, x: Tensor, mask: Tensor | None) -> None:
        group, rows = groups[path], _rows(x, mask, path)
        if rows.shape[0] >= group.n_directions:
            group.found = updated(group.found, rows, group.n_directions)

    return add


def _ranks(groups: list[_Group], budget: int) -> dict[str, int]:
    """Return the ranks of all layers, by path: the number of a layer's directions among the ``budget`` best of all
    layers. If directions of two layers explain equally much, the first layer of each group precedes the others, as in
    PEFT.
    """
    first = {group.paths[0]: group for group in groups}
    rest = {path: group for group in groups for path in group.paths[1:]}
    return shared_ranks({p: cast(Directions, g.found).explained() for p, g in (first | rest).items()}, budget)


def _rows(x: Tensor, mask: Tensor | None, path: str) -> Tensor:
    """Return the rows (n, i) of a layer's input that count."""
    rows = x[mask.to(x.device)] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
    if not torch.isfinite(rows).all():
        raise NonFiniteError(
            f"the input of {path} holds NaN or infinity, from which EVA cannot start: look for the batch, or for a "
            "dtype too narrow for this model"
        )
    return rows


def _mask(batch: Batch, eva: EvaConfig) -> Tensor | None:
    """Return the mask (n, t) of the positions that count, or None if the batch has none."""
    found = [batch["attention_mask"].bool()] if isinstance(batch.get("attention_mask"), Tensor) else []
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if eva.use_label_mask and isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape:
        found.append(labels != eva.label_mask_value)
    return torch.stack(found).all(dim=0) if found else None


def _digest(x: Tensor) -> tuple[torch.Size, str]:
    """Return a fingerprint of a layer's input, so that inputs can be compared without being kept."""
    return x.shape, hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _start(model: PeftModel, name: str) -> tuple[LateStart, EvaConfig]:
    require_known(model.adapter_state, (name,))
    if model.adapter_state.merged:
        raise AdapterNameError(f"{list(model.adapter_state.merged)} are merged: call unmerge_adapter() before EVA")
    config = model.peft_config[name]
    start = config.late_start
    if start is None or not isinstance(start.settings, EvaConfig):
        raise ConfigError(
            f"{name!r} does not start from EVA: give LoraConfig(init_lora_weights='eva'), not {type(config).__name__} "
            f"with init_lora_weights={getattr(config, 'init_lora_weights', None)!r}"
        )
    return start, start.settings


def _layers(model: PeftModel, name: str) -> dict[str, AdaptedSite]:
    found = {p: m for p, m in adapted_layers(model).items() if m.takes_rows and name in m.adapters}
    if not found:
        raise ConfigError(
            f"EVA starts the factors of linear layers, and {name!r} adapts none: name linear layers in target_modules"
        )
    return found


def _require_fitting(factors: Mapping[str, Tensor], layers: Mapping[str, AdaptedSite]) -> None:
    unknown = [path for path in factors if path not in layers]
    widths = {path: layer.site(()).in_features for path, layer in layers.items()}
    wrong = [
        f"{path} {tuple(a.shape)} instead of (rank, {widths[path]})"
        for path, a in factors.items()
        if path in widths and (a.ndim != 2 or a.shape[1] != widths[path])
    ]
    told = [f"no such layers {unknown}"] * bool(unknown) + [f"shapes {wrong}"] * bool(wrong)
    if told:
        raise ShapeError(
            f"eva_state_dict does not fit the adapter: {'; '.join(told)}. Make it from this model "
            "with get_eva_state_dict"
        )


def _put(held: nn.Module, start: LateStart, a: Tensor) -> None:
    """Write A, and a zero B of the same rank, into one layer's parameters."""
    parameters = cast(nn.ParameterDict, held)
    b = torch.zeros(parameters[start.b].shape[0], a.shape[0])
    for key, value in ((start.a, a), (start.b, b)):
        old = cast(nn.Parameter, parameters[key])
        if old.shape == value.shape:
            old.copy_(value)
        else:
            parameters[key] = nn.Parameter(value.to(old, copy=True).contiguous(), requires_grad=old.requires_grad)


def _remove(layer: AdaptedSite, name: str, with_bias: bool) -> None:
    del layer.adapters[name]
    if with_bias and name in layer.copies:
        del layer.copies[name]
    if not layer.adapters and not layer.copies:
        restore(layer)
