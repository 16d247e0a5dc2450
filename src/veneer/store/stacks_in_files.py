"""Experts that stay in codes: the tensors in files of each stack of the model, and its storage format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from veneer.model.adapted.experts import runs_by_convention, stacks_by_convention
from veneer.model.quantized.renamed import ListedExperts, listed_experts, renamer
from veneer.model.quantized.stack import map_shape, place_of
from veneer.quant.stack import StackSpec
from veneer.store.checkpoint import Stored
from veneer.store.quantization_config import QuantizationConfig

Layers = Mapping[str, Mapping[str, Stored]]
"""Quantized layers of the files, and stacks of experts: their tensors by part."""
Place = tuple[tuple[int, int, int], torch.dtype]
"""Shape (experts, o, i) of a stack of the model, and its dtype."""


@dataclass(frozen=True)
class StackInFiles:
    """Stack of experts as the checkpoint stores it.

    ``spec`` is the storage format. ``parts`` are the tensors, by their names below the experts' path. ``layers`` are
    the quantized layers of the files that make up the stack.
    """

    spec: StackSpec
    layers: tuple[str, ...]
    parts: Mapping[str, Stored]


def stacks_of(model: PreTrainedModel) -> dict[str, Place]:
    """Return the stacks of experts that can be run in codes, by the names of their parameters."""
    return {
        f"{path}.{key}": (cast("tuple[int, int, int]", map_shape(module, key)), place_of(module, key)[1])
        for path, module in model.named_modules()
        if runs_by_convention(module)
        for key in stacks_by_convention(module)
        if key in module._parameters and len(map_shape(module, key)) == 3
    }


def stacks_in_files(
    model: PreTrainedModel, config: QuantizationConfig, skip: Sequence[str], layers: Layers
) -> dict[str, StackInFiles]:
    """Return the stacks whose experts are all quantized in the files, in one format, by the model's names.

    The files list experts one by one, or stack them too. ``skip``: modules that the config leaves dense.
    """
    places, to_own = stacks_of(model), renamer(model)
    stacked = {to_own(layer): layer for layer in layers if config.is_stack(layer)}
    found = {}
    for name, spec in _stacked_specs(places, config, skip).items():
        layer = next((stacked[each] for each in _spellings(model, name) if each in stacked), None)
        if layer is not None:
            found[name] = StackInFiles(spec, (layer,), layers[layer])
    weights = {to_own(weight): weight for layer in layers if (weight := config.weight_name(layer)) != layer}
    listed = _listed(model, places, weights)
    for name, spec in _listed_specs(places, listed, config, skip).items():
        found[name] = _gathered(name, listed[name], layers, spec)
    return found


def leaves_dense(model: PreTrainedModel, skip: Sequence[str], layer: str) -> bool:
    """Return True if the config leaves a stack dense. ``layer`` is the stack's name in the files."""
    return not all(_quantizes(name, skip) for name in _spellings(model, renamer(model)(layer)))


def planned_stacks(model: PreTrainedModel, config: QuantizationConfig, skip: Sequence[str]) -> dict[str, StackSpec]:
    """Return the storage formats of `stacks_in_files` for files that hold all experts as the config says."""
    places = stacks_of(model)
    listed = _listed(model, places, _Every())
    return _listed_specs(places, listed, config, skip) | _stacked_specs(places, config, skip)


def new_stacks(model: PreTrainedModel, config: QuantizationConfig, skip: Sequence[str]) -> dict[str, StackSpec]:
    """Return the storage formats of the stacks that are quantized while a dense checkpoint is loaded."""
    found = {}
    for name, ((n_experts, o, i), dtype) in stacks_of(model).items():
        spec = config.spec_of(name, (o, i), dtype) if _quantizes(name, skip) else None
        if spec is not None:
            found[name] = StackSpec(n_experts, (spec,), (name.rpartition(".")[2],))
    return found


class _Every(dict[str, str]):
    """Mapping that contains every name and maps it to itself, used if the files have the names of transformers."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return name


def _stacked_specs(
    places: Mapping[str, Place], config: QuantizationConfig, skip: Sequence[str]
) -> dict[str, StackSpec]:
    specs = {n: config.stack_of(n, *place) for n, place in places.items() if _quantizes(n, skip)}
    return {name: spec for name, spec in specs.items() if spec is not None}


def _listed(
    model: PreTrainedModel, places: Mapping[str, Place], weights: Mapping[str, str]
) -> dict[str, ListedExperts]:
    """Return the stacks of experts that the files store as one tensor for each expert, keyed by the stack's name.

    The tensors are named as in another library's checkpoints, or as veneer saves a stack. For another library's names,
    transposed modules are left out, because its experts are not transposed.
    """
    turned = {path for path, module in model.named_modules() if getattr(module, "is_transposed", False)}
    shapes = {name: shape for name, (shape, _) in places.items() if name.rpartition(".")[0] not in turned}
    saved = {}
    for name, ((n_experts, _, _), _) in places.items():
        path, _, key = name.rpartition(".")
        own = [f"{path}.{number}.{key}.weight" for number in range(n_experts)]
        if all(each in weights for each in own):
            saved[name] = ListedExperts([[weights[each] for each in own]], [own])
    return saved | listed_experts(model, shapes, weights)


def _listed_specs(
    places: Mapping[str, Place], listed: Mapping[str, ListedExperts], config: QuantizationConfig, skip: Sequence[str]
) -> dict[str, StackSpec]:
    """Return the storage formats of the stacks whose experts are listed one by one, if all experts of a stack have one
    format.
    """
    found = {}
    for name, experts in listed.items():
        if not _quantizes(name, skip):
            continue
        (n_experts, o, i), dtype = places[name]
        shape, pieces = (o // len(experts.own), i), []
        for half in experts.own:
            layers = [each.removesuffix(".weight") for each in half]
            specs = {config.spec_of(e, shape, dtype) if should_convert_module(e, skip) else None for e in layers}
            pieces += [spec for spec in specs if spec is not None and len(specs) == 1]
        if len(pieces) == len(experts.own):
            names = tuple(_below(name, half[0]).split(".")[1] for half in experts.own)
            found[name] = StackSpec(n_experts, tuple(pieces), names)
    return found


def _quantizes(name: str, skip: Sequence[str]) -> bool:
    """Return True if neither a stack nor its experts are among the modules that stay dense."""
    return all(should_convert_module(each, skip) for each in (name, name.rpartition(".")[0]))


def _gathered(name: str, listed: ListedExperts, layers: Layers, spec: StackSpec) -> StackInFiles:
    """Return a stack with the tensors of all its experts."""
    parts: dict[str, Stored] = {}
    taken = []
    for own, stored in zip(listed.own, listed.stored, strict=True):
        for own_name, stored_name in zip(own, stored, strict=True):
            layer, front = stored_name.removesuffix(".weight"), _below(name, own_name).removesuffix("weight")
            taken.append(layer)
            parts |= {front + part: tensor for part, tensor in layers[layer].items()}
    return StackInFiles(spec, tuple(taken), parts)


def _below(name: str, own: str) -> str:
    """Return the tensor name ``own`` relative to the module of experts that holds the parameter ``name``."""
    return own.removeprefix(name.rpartition(".")[0] + ".")


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Return the names under which files may hold a parameter: as given, without the backbone's prefix (``model.``),
    and with it.
    """
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name
