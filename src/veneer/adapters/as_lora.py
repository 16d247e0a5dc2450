"""Adapters of other methods as plain LoRA: `convert_to_lora` and `save_as_lora`, under PEFT's names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veneer.adapters import lifecycle
from veneer.adapters.card import write_card
from veneer.adapters.combining import require_layers_alone
from veneer.adapters.merging import require_known
from veneer.combine.adapter import raised
from veneer.combine.plain import Plain, plain_of, plain_within, whole_error
from veneer.combine.update import Update
from veneer.contract.config import for_use
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.places import placed
from veneer.disk.atomic import write_together
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import AdapterNameError, CompositionError, ConfigError
from veneer.methods.lora import LoraConfig
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_layers, detach, module_index
from veneer.model.modules.snapshot import shortest_names
from veneer.plain.progress import progress_bar
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.store.adapter.tensors import assign

Rank = int | float | None


@dataclass(frozen=True, kw_only=True)
class AsLora:
    """Plain LoRA made from another adapter, and the error of the conversion.

    ``tensors``: the file's tensors, by key. ``layers``: the factors, by module path. ``of_logits``: the relative error
    of the change of the logits, if it was measured.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Plain]
    of_logits: float | None = None

    @property
    def error(self) -> float:
        """Relative Frobenius error of all updates together; 0 if the conversion is exact."""
        return whole_error(self.layers.values())

    @property
    def worst_layer(self) -> str:
        """Path of the layer with the largest error."""
        return max(self.layers, key=lambda path: self.layers[path].error)


def convert_to_lora(
    model: nn.Module,
    rank: Rank = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, object] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return an adapter of a model as plain LoRA: its config, and its tensors by their keys on disk.

    An update that is a low-rank pair is kept exactly, unless its rank is above ``rank``. Any other update becomes the
    nearest one of that rank. If ``rank`` is below 1, or 1.0, it is the share of the squared singular values to keep:
    each layer, even with a low-rank pair, gets the smallest rank that keeps it. None allows only exact updates. The
    scale of each layer is 1. ``compile_kwargs`` has no effect.
    Difference from PEFT: PEFT always computes the nearest update of that rank, by a singular value decomposition.
    Raises CompositionError if the adapter does more than add to weights, and ConfigError for an impossible rank. Raises
    AdapterNameError for an unknown name, or while adapters are merged.
    """
    found = as_lora(model, rank, adapter_name, progressbar=progressbar)
    return found.config, dict(found.tensors)


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: Rank = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, object] | None = None,
    *,
    input_ids: Int[Tensor, "batch tokens"] | None = None,
) -> AsLora:
    """Convert an adapter as `convert_to_lora` does, and write it as an adapter folder. Return the converted adapter
    with its error.

    ``input_ids``: tokens on which the error of the logits is measured too. Raises the errors of `convert_to_lora`, and
    DiskError. Raises ConfigError if the folder holds an adapter already, because this may be the one converted.
    """
    if (Path(path) / CONFIG_FILE).exists():
        raise ConfigError(f"{path} holds an adapter, and nothing is overwritten: choose another folder")
    found = as_lora(model, rank, adapter_name, progressbar=progressbar)
    if input_ids is not None:
        found = replace(found, of_logits=_error_of_logits(model, found, adapter_name, input_ids))
    config = for_use(found.config)
    write_together(
        Path(path), {WEIGHTS_FILE: tensors_to_bytes(found.tensors), CONFIG_FILE: config.to_json({}).encode()}
    )
    write_card(Path(path), config)
    return found


@torch.no_grad()
def as_lora(model: nn.Module, rank: Rank, name: str, *, progressbar: bool = False) -> AsLora:
    """Return an adapter of a model as plain LoRA, with the error of each layer. See `convert_to_lora`."""
    _require_rank(rank)
    state = _state(model, name)
    lifecycle.require_unmerged(state, f"convert {name!r} to LoRA")  # methods read the base's own weight
    require_layers_alone(model, state, (name,))
    found, sites, paths = dict[str, Plain](), dict[str, LinearSite](), dict[str, str]()
    layers = {path: layer for path, layer in adapted_layers(model).items() if name in layer.adapters}
    with progress_bar("converting to LoRA, layer") if progressbar else nullcontext(_say_nothing) as on_progress:
        for done, (path, layer) in enumerate(layers.items(), start=1):
            sites[path], paths[path] = layer.site((name,)), layer.disk_path(name, path)
            found[path] = _plain(path, Update(layer.record(name, sites[path]), sites[path].weight), rank)
            on_progress(done, len(layers))
    records = {path: LinearDelta.pair(plain.a, plain.b) for path, plain in found.items()}
    targets = tuple(path for path in found if sites[path].repeats == 1)  # an attention is named for its output too
    lora = raised(records, shortest_names(module_index(model), targets))
    source = state.configs[name]
    config = replace(
        cast(LoraConfig, lora.config),
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        task_type=source.task_type,
    )
    tensors: dict[str, Tensor] = {}
    for path, record in records.items():
        shapes, keys = config.shapes(sites[path]), placed(config, sites[path], paths[path]).keys
        values = lora.parameters(sites[path], record)
        tensors |= {key: values[own].reshape(shapes[own]).contiguous() for own, key in keys.items()}
    return AsLora(config=config, tensors=tensors, layers=found)


def _say_nothing(done: int, total: int) -> None:
    """Ignore progress: the caller asked for none."""


def _plain(path: str, update: Update, rank: Rank) -> Plain:
    """Return the factors of an update as plain LoRA.

    If ``rank`` is None, the update's own factors are returned. An int is the rank of the nearest factors. A float is
    the share of the squared norm that they must keep. Raises CompositionError for a change of a bias or of stacked
    experts, and for an update of full rank without a rank.
    """
    record = update.record
    if record.bias is not None:
        raise CompositionError(f"the adapter changes the bias of {path}, which plain LoRA does not: merge it instead")
    if record.low_rank is not None and record.low_rank.is_stacked:
        raise CompositionError(f"the adapter changes the experts of {path}, stacked in one parameter: merge it instead")
    if rank is None and not update.is_lowrank:
        raise CompositionError(
            f"the update of {path} ({record.told}) has full rank: give a rank (--rank N), which shows what is lost"
        )
    if rank is None or isinstance(rank, int):
        return plain_of(update, rank)
    return plain_within(update, math.sqrt(1 - rank))


def _error_of_logits(model: nn.Module, found: AsLora, name: str, input_ids: Int[Tensor, "batch tokens"]) -> float:
    """Return the error of the logits under plain LoRA, relative to the adapter's change of the logits."""
    state, other = _state(model, name), f"{name}_as_lora"
    lifecycle.add(model, state, other, replace(found.config, inference_mode=True), Allocation(values=False))
    try:
        assign(model, state, other, found.tensors, source="the converted adapter")
        base, exact, near = (_logits(model, state, names, input_ids) for names in ((), (name,), (other,)))
    finally:
        detach(model, state, other)
    change = float((exact - base).norm())
    return float((near - exact).norm()) / change if change > 0 else 0.0


@torch.no_grad()
def _logits(
    model: nn.Module, state: AdapterState, names: tuple[str, ...], input_ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens vocabulary"]:
    training = model.training
    model.eval()
    try:
        with state.only(names):
            logits: Tensor = model(input_ids=input_ids).logits
    finally:
        model.train(training)
    return logits.double()


def _require_rank(rank: Rank) -> None:
    fits = rank is None or (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank <= 1)
    if isinstance(rank, bool) or not fits:
        raise ConfigError(f"rank={rank!r} is neither a whole number of at least 1 nor a share in (0, 1]")


def _state(model: nn.Module, name: str) -> AdapterState:
    state = vars(model).get("adapter_state")
    if not isinstance(state, AdapterState):
        raise AdapterNameError(f"this {type(model).__name__} has no adapters: there is nothing to convert")
    require_known(state, (name,))
    return state
