"""Arrow: a router over saved adapters, which gives each token the adapters that amplify it most."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.contract.source import adapter_folder, hub_options
from veneer.errors import CompositionError, ConfigError
from veneer.methods.arrow import ArrowConfig, of_experts
from veneer.model.adapted.site import factors_of
from veneer.model.attach.attach import adapted_layers, module_index
from veneer.model.modules.snapshot import shortest_names
from veneer.records.terms.pair import Pair
from veneer.store.adapter.records import read_updates
from veneer.store.adapter.skeleton import places_in_base

NAME = "arrow_router"
AdapterPath = str | os.PathLike[str]


@torch.no_grad()
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[AdapterPath],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[AdapterPath] | None = None,
    **hub: str | bool | None,
) -> PeftModel:
    """Attach one frozen adapter, ``"arrow_router"``, that mixes saved adapters for each token.

    The paths are folders or hub ids of adapters made of low-rank pairs, all of one rank and on the same layers. With
    ``use_gks``, the mean A and the mean B of the general adapters are subtracted from A and B of every other adapter
    (GenKnowSub, doi:10.18653/v1/2025.acl-short.54). ``hub`` takes the fields of `HubOptions`.

    Difference from PEFT: PEFT keeps the adapters on the model. Here their factors belong to the one adapter, and are
    saved in its file.

    Raises ConfigError for paths that do not fit the config, CompositionError for adapters that do not fit together, and
    the errors of loading.
    """
    _require_paths(arrow_config, task_specific_adapter_paths, general_adapter_paths)
    folders = [adapter_folder(path, hub_options(hub)) for path in task_specific_adapter_paths]
    general = [adapter_folder(path, hub_options(hub)) for path in (general_adapter_paths or ())]
    pairs = {folder: _pairs(folder) for folder in (*folders, *general)}
    first = _require_alike(pairs)
    targets = shortest_names(module_index(base_model), tuple(first))
    rank = next(iter(first.values())).rank
    config = replace(arrow_config, r=rank, n_experts=len(folders), target_modules=targets, inference_mode=True)
    model = get_peft_model(base_model, config, NAME)
    for path, layer in adapted_layers(model).items():
        own = [pairs[folder][path] for folder in folders]
        a, b = (torch.stack([getattr(pair, factor).float() for pair in own]) for factor in "ab")
        if general:
            others = [pairs[folder][path] for folder in general]
            a = a - torch.stack([pair.a.float() for pair in others]).mean(dim=0)
            b = b - torch.stack([pair.b.float() for pair in others]).mean(dim=0)
        held = factors_of(layer.adapters[NAME])
        scales = torch.tensor([pair.scale for pair in own])
        for key, value in of_experts(a, b, scales, arrow_config.rng_seed).items():
            held[key].copy_(value)
    return model


def _require_paths(config: ArrowConfig, paths: Sequence[AdapterPath], general: Sequence[AdapterPath] | None) -> None:
    if isinstance(paths, str | os.PathLike) or len(paths) < config.top_k:
        raise ConfigError(
            f"task_specific_adapter_paths={paths!r} must be a list of at least top_k={config.top_k} adapters"
        )
    if config.use_gks and (not general or isinstance(general, str | os.PathLike)):
        raise ConfigError(f"use_gks=True needs general_adapter_paths, a list of adapters; given: {general!r}")
    if general and not config.use_gks:
        raise ConfigError("general_adapter_paths has no effect with use_gks=False: give use_gks=True, or leave it out")


def _pairs(folder: Path) -> dict[str, Pair]:
    """Return the low-rank pair of each layer that an adapter changes, by path."""
    updates = read_updates(folder, places_in_base(folder)).updates
    wrong = next((path for path, record in updates.items() if not record.is_low_rank or record.bias is not None), None)
    if wrong is not None:
        raise CompositionError(
            f"the adapter {folder} changes {wrong} by {updates[wrong].told}, and Arrow mixes low-rank pairs alone. "
            "Leave it out"
        )
    return {path: record.low_rank.plain for path, record in updates.items() if record.low_rank is not None}


def _require_alike(pairs: Mapping[Path, Mapping[str, Pair]]) -> Mapping[str, Pair]:
    """Return the pairs of the first adapter. Raises CompositionError if another adapter has other layers or ranks."""
    first, *others = pairs
    ranks = {folder: {pair.rank for pair in own.values()} for folder, own in pairs.items()}
    for folder in others:
        if pairs[folder].keys() != pairs[first].keys():
            odd = sorted(pairs[folder].keys() ^ pairs[first].keys())[0]
            raise CompositionError(
                f"only one of the adapters {first} and {folder} changes {odd}: give adapters of one config"
            )
    if len(set.union(*ranks.values())) != 1:
        told = ", ".join(f"{folder} {sorted(own)}" for folder, own in ranks.items())
        raise CompositionError(f"the adapters have different ranks ({told}): give adapters of one rank")
    return pairs[first]
