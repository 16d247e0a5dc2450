"""One adapter made of several that are on a model: `PeftModel.add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from veneer.adapters import lifecycle
from veneer.adapters.merging import require_known
from veneer.combine import Combination, combine
from veneer.combine.update import Update
from veneer.core.records import LinearDelta
from veneer.errors import CompositionError
from veneer.methods.ia3 import IA3Config
from veneer.methods.lora import LoraConfig
from veneer.model.attach import Start, adapted_layers, adapted_modules, module_index, shortest_names
from veneer.model.linear import AdaptedSite
from veneer.model.state import AdapterState

_SVD_SUFFIX = "_svd"


@dataclass(frozen=True)
class Report:
    """What combining lost: for each layer the relative Frobenius error of bringing the result to its rank."""

    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest error of a layer; 0 where the combination is exact."""
        return max(self.errors.values(), default=0.0)


def plan_of(combination_type: str, rank: int | None, density: float | None, vote: str, seed: int = 0) -> Combination:
    """A plan from PEFT's words. "ties_svd" and the like name what "ties" is here: whole updates, brought to a rank."""
    how = combination_type.removesuffix(_SVD_SUFFIX) if combination_type != "svd" else combination_type
    return Combination(how=how, rank=rank, density=density, vote=vote, seed=seed)  # type: ignore[arg-type]


@torch.no_grad()
def add_weighted(
    model: nn.Module, state: AdapterState, parts: Sequence[tuple[str, float]], name: str, plan: Combination
) -> Report:
    """Add adapter ``name``, frozen, that acts as the weighted parts do together.

    A layer that a part leaves alone counts as unchanged by it.

    Raises AdapterNameError, and CompositionError where the parts cannot be combined; nothing is added then.
    """
    names, weights = tuple(part for part, _ in parts), [weight for _, weight in parts]
    require_known(state, names)
    _require_no_whole_parameters(model, names)
    records: dict[str, LinearDelta] = {}
    errors: dict[str, float] = {}
    for path, layer in adapted_layers(model).items():
        held = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.adapters]
        if held:
            updates = [Update(layer.record(n), layer.site((n,)).weight) for n, _ in held]
            records[path], errors[path] = combine(updates, [w for _, w in held], plan)
            records[path] = replace(records[path], bias=_bias_offset(layer, updates, [w for _, w in held]))
    if not records:
        raise CompositionError(f"none of the adapters {list(names)} acts on linear layers: only such can be combined")
    lifecycle.add(model, state, name, _config(model, records), Start(values=False))
    lifecycle.set_requires_grad(model, (name,), False)
    for path, record in records.items():
        _fill(cast(AdaptedSite, model.get_submodule(path)), name, record)
    return Report(errors)


def _config(model: nn.Module, records: Mapping[str, LinearDelta]) -> LoraConfig | IA3Config:
    """A config under which each layer's record is what was computed: LoRA with a scale of one, or IA3."""
    targets = shortest_names(module_index(model, embeddings=True), tuple(records))
    ranks = {path: record.rank for path, record in records.items()}
    if not any(ranks.values()):
        inputs = tuple(path for path, record in records.items() if record.in_scale is not None)
        return IA3Config(target_modules=tuple(records), feedforward_modules=inputs)
    if not all(ranks.values()):
        raise CompositionError(
            "on some layers only adapters that rescale act (IA3), on others low-rank ones: no one method is both"
        )
    commonest = max(set(ranks.values()), key=list(ranks.values()).count)
    special = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != commonest}
    return LoraConfig(
        r=commonest,
        lora_alpha=commonest,
        target_modules=targets,
        rank_pattern=special,
        alpha_pattern=dict(special),
        lora_bias=any(record.bias is not None for record in records.values()),
    )


def _fill(layer: AdaptedSite, name: str, record: LinearDelta) -> None:
    holder = dict(layer.adapters[name].named_parameters())
    values: dict[str, Tensor | None] = {"lora_A": record.a, "lora_B": record.b, "lora_B_bias": record.bias}
    if "ia3_l" in holder:
        values = {"ia3_l": record.out_scale if record.in_scale is None else record.in_scale}
    for key, parameter in holder.items():
        value = values[key]
        parameter.copy_(torch.zeros_like(parameter) if value is None else value.view_as(parameter))


def _bias_offset(layer: AdaptedSite, updates: Sequence[Update], weights: Sequence[float]) -> Tensor | None:
    """``Σ w_i (bias_i - own)`` over low-rank parts that change the bias; a rescaled bias follows from the scale."""
    own = layer.site(()).bias
    changes = [
        w * (u.record.bias - (0 if own is None else own))
        for u, w in zip(updates, weights, strict=True)
        if u.record.bias is not None and u.record.rank
    ]
    return sum(changes[1:], changes[0]) if changes else None


def _require_no_whole_parameters(model: nn.Module, names: Sequence[str]) -> None:
    held = sorted({path for path, module in adapted_modules(model).items() for n in names if n in module.copies})
    if held:
        raise CompositionError(
            f"the adapters {list(names)} train whole parameters (modules_to_save or biases) of {', '.join(held[:3])}: "
            "those have no sum in an adapter; combine merged checkpoints instead"
        )
