"""Combination of several adapters on a model into one: `PeftModel.add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapters import lifecycle
from veneer.adapters.card import write_card
from veneer.adapters.merging import require_everywhere, require_known
from veneer.combine import SPARSE, Combination, combine
from veneer.combine.adapter import raised
from veneer.combine.choose import rank_needed
from veneer.combine.scales import only_scales
from veneer.combine.update import Update
from veneer.contract.places import placed
from veneer.errors import CompositionError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.holder import tensors_of
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_layers, adapted_places, module_index
from veneer.model.modules.snapshot import shortest_names
from veneer.plain.field_types import fits, misfits
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.store.adapter.config import read_config
from veneer.store.adapter.records import NeedsBaseError, StoredAdapter, read_records, read_updates, write_records
from veneer.store.adapter.skeleton import places_in_base
from veneer.store.named_base import is_one_model

_SVD_SUFFIX = "_svd"


@dataclass(frozen=True)
class Report:
    """Error of a combination: for each layer, the relative Frobenius error of reducing the result to its rank."""

    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """Largest error of any layer; 0 if the combination is exact."""
        return max(self.errors.values(), default=0.0)


_ARGUMENTS: Mapping[str, Any] = {
    "adapters": Collection[str],
    "weights": Collection[float],
    "combination_type": str | None,
    "svd_rank": int | None,
    "density": float | None,
    "seed": int,
}


def require_types(**given: object) -> None:
    """Raise CompositionError that lists every argument of the wrong type for `PeftModel.add_weighted_adapter`."""
    wrong = {name: value for name, value in given.items() if not fits(value, _ARGUMENTS[name])}
    if wrong:
        raise CompositionError(
            "; ".join(said for name, value in wrong.items() for said in misfits(name, value, _ARGUMENTS[name]))
        )


def plan_of(combination_type: str, rank: int | None, density: float | None, vote: str, seed: int = 0) -> Combination:
    """Return a combination plan from PEFT's arguments.

    "ties_svd" and the like mean the same as "ties" here: whole updates, reduced to a rank. As in PEFT, combination
    types without pruning ignore ``density``.
    """
    how = combination_type.removesuffix(_SVD_SUFFIX) if combination_type != "svd" else combination_type
    return Combination(how=how, rank=rank, density=density if how in SPARSE else None, vote=vote, seed=seed)  # type: ignore[arg-type]


def usual_way(model: nn.Module, names: Sequence[str]) -> str:
    """Return PEFT's default: "svd", or "linear" if the adapters hold only scales in linear layers."""
    held = [(layer, n) for layer in adapted_layers(model).values() for n in names if n in layer.adapters]
    return "linear" if held and all(only_scales([Update(layer.record(n))]) for layer, n in held) else "svd"


@torch.no_grad()
def add_weighted(
    model: nn.Module,
    state: AdapterState,
    parts: Sequence[tuple[str, float]],
    name: str,
    plan: Combination,
    *,
    most_lost: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Add a frozen adapter ``name``: the weighted sum of the adapters ``parts``, combined as ``plan`` says.

    If a part has no update on a layer, its update there counts as zero. ``most_lost`` is the largest relative error
    that a linear sum may have on a layer if the plan names no rank. ``on_progress`` is called with the number of layers
    done and the number of all layers. Raises AdapterNameError for the names, and CompositionError if the parts cannot
    be combined. In both cases nothing is added.
    """
    names, weights = tuple(part for part, _ in parts), [weight for _, weight in parts]
    require_known(state, names)
    require_layers_alone(model, state, names)
    records: dict[str, LinearDelta] = {}
    errors: dict[str, float] = {}
    layers = adapted_layers(model)
    for done, (path, layer) in enumerate(layers.items(), start=1):
        acting = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.adapters]
        if acting:
            updates = [Update(layer.record(n), layer.site((n,)).weight) for n, _ in acting]
            _require_no_groups(layer.site(()), updates)
            records[path], errors[path] = combine(updates, [w for _, w in acting], plan, path)
            if records[path].only_adds:
                records[path] = replace(records[path], bias=_bias_offset(layer, updates, [w for _, w in acting]))
        on_progress(done, len(layers))
    if not records:
        raise CompositionError(
            f"none of the adapters {list(names)} acts on linear layers: only adapters of linear layers can be combined"
        )
    if most_lost is not None and plan.how == "linear" and plan.rank is None:
        _require_little_lost(model, parts, plan, errors, most_lost)
    _add_of_records(model, state, name, records)
    return Report(errors)


def _add_of_records(model: nn.Module, state: AdapterState, name: str, records: Mapping[str, LinearDelta]) -> None:
    """Add a frozen adapter made of these records, which are given by module path."""
    sum_of = raised(records, shortest_names(module_index(model), tuple(records)))
    lifecycle.add(model, state, name, sum_of.config, Allocation(values=False))
    lifecycle.make_trainable(model, state, (name,), False)
    for path, record in records.items():
        layer = cast(AdaptedSite, model.get_submodule(path))
        held = tensors_of(layer.adapters[name])
        for key, value in sum_of.parameters(layer.site((name,)), record).items():
            held[key].copy_(value.view_as(held[key]))


def _require_little_lost(
    model: nn.Module, parts: Sequence[tuple[str, float]], plan: Combination, errors: Mapping[str, float], most: float
) -> None:
    worst = max(errors, key=lambda path: errors[path])
    if errors[worst] <= most:
        return
    needed, sides = 0, []
    for path in (path for path, error in errors.items() if error > 0):
        layer = adapted_layers(model)[path]
        acting = [(n, w) for n, w in parts if n in layer.adapters]
        updates = [Update(layer.record(n), layer.site((n,)).weight) for n, _ in acting]
        needed = max(needed, rank_needed(updates, [w for _, w in acting], plan, path, most))
        sides.append(min(layer.site(()).in_features, layer.site(()).out_features))
    possible = needed <= min(sides)
    advice = f"give rank {needed}, which loses at most {most:.0%}; or " if possible else ""
    raise CompositionError(
        "a part is more than a low-rank pair (DoRA, OFT, LoKr). Its sum has full rank: the rank of its parts loses "
        f"{errors[worst]:.1%} of it on {worst}: {advice}merge each adapter into the base and add the models up "
        "(veneer merge, veneer merge-models), which loses nothing; or give a rank of your choice"
    )


def _bias_offset(layer: AdaptedSite, updates: Sequence[Update], weights: Sequence[float]) -> Tensor | None:
    """Return ``Σ w_i (bias_i - own)`` over the updates that change the bias; ``own`` is the layer's bias, or 0. Return
    None if no update changes the bias.
    """
    own = layer.site(()).bias
    changes = [
        w * (u.record.bias - (0 if own is None else own))
        for u, w in zip(updates, weights, strict=True)
        if u.record.bias is not None
    ]
    return sum(changes[1:], changes[0]) if changes else None


def _require_no_groups(site: LinearSite, updates: Sequence[Update]) -> None:
    if site.groups > 1 and not only_scales(updates):
        raise CompositionError(
            f"{site.name} is a convolution in {site.groups} groups of channels: updates of such layers cannot be "
            "combined into one adapter. Activate the adapters together with set_adapter instead."
        )


def require_layers_alone(model: nn.Module, state: AdapterState, names: Sequence[str]) -> None:
    """Raise CompositionError if an adapter holds anything other than updates of linear layers."""
    held = []
    for name in names:
        require_everywhere(name, state.configs[name])
    for path, place in adapted_places(model).items():
        if not place.folds:
            beside = [name for name in names if name in place.adapters]
            if beside:
                raise CompositionError(
                    f"adapter {beside[0]!r} ({state.configs[beside[0]].peft_type}) is no update of linear layers: "
                    "leave it as it is, beside the adapters that are"
                )
        elif any(place.holds(name) and not place.is_update(name) for name in names):
            held.append(path)
    if held:
        raise CompositionError(
            f"the adapters {list(names)} train whole parameters (modules_to_save, norms, biases), rows, or experts "
            f"of {', '.join(sorted(held)[:3])}: these are no updates of linear layers. Merge each adapter into its "
            "base (veneer merge), and add merged models up (veneer merge-models)"
        )


def combine_folders(
    folders: Sequence[Path],
    weights: Sequence[float],
    plan: Combination,
    output: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Combine adapters on disk without their base, and write the result as an adapter folder.

    ``on_progress`` is called with the number of layers done and the number of all layers. If a file does not hold the
    sizes of its layers (VeRA), they are read from the base's config, if it is on this machine. Raises FormatError for a
    damaged folder. Raises CompositionError for adapters that need their base or cannot be combined.
    """
    stored = [read_updates(folder, places_in_base(folder)) for folder in folders]
    for folder, adapter in zip(folders, stored, strict=True):
        require_everywhere(folder, adapter.config)
    places = {path: place for adapter in stored for path, place in adapter.places.items()}
    sites = {path: cast(LinearSite, place.site) for path, place in places.items()}
    _require_same_shapes(folders, stored, sites)
    records: dict[str, LinearDelta] = {}
    errors: dict[str, float] = {}
    for done, path in enumerate(sites, start=1):
        held = zip(stored, weights, strict=True)
        acting = [(a.updates[path], w) for a, w in held if path in a.updates]
        updates = [Update(r) for r, _ in acting]
        _require_no_groups(sites[path], updates)
        records[path], errors[path] = combine(updates, [w for _, w in acting], plan, path)
        changes = [r.bias * w for r, w in acting if r.bias is not None]
        records[path] = replace(records[path], bias=sum(changes[1:], changes[0]) if changes else None)
        on_progress(done, len(sites))
    # an attention's output projection goes by the attention
    targets = tuple(path for path, site in sites.items() if site.repeats == 1)
    sum_of = raised(records, targets)
    config = replace(sum_of.config, base_model_name_or_path=_common_base(stored))
    written = {path: placed(config, sites[path], places[path].path) for path in records}
    write_records(output, config, {p: sum_of.parameters(sites[p], record) for p, record in records.items()}, written)
    write_card(output, config)
    return Report(errors)


def require_rank(folders: Sequence[Path], plan: Combination) -> None:
    """Raise CompositionError if the sum of the adapters has full rank and the plan gives no rank.

    The sum has full rank if one of the adapters rotates or scales inputs or outputs (OFT, BOFT, RoAd, IA3). The
    exception is that all of them only scale. Only configs and files are read. Adapters that need the base, such as
    DoRA, are checked by `add_weighted`.
    """
    if plan.how != "linear" or plan.rank is not None:
        return
    of = {folder: _told_updates(folder) for folder in folders}
    around = [folder for folder, records in of.items() if not all(record.only_adds for record in records)]
    scaling = [folder for folder in around if all(record.only_scales for record in of[folder])]
    if around and len(scaling) < len(folders):
        raise CompositionError(
            f"the adapter {around[0]} ({read_config(around[0]).peft_type}) rotates or scales inputs or outputs, so "
            "that its sum has full rank: give the rank of the result (--rank N), and its error is printed; or merge "
            "each adapter into the base and add the models up (veneer merge, veneer merge-models), which loses nothing"
        )


def _told_updates(folder: Path) -> tuple[LinearDelta, ...]:
    """Return the updates stored in an adapter's file; empty if they depend on the base."""
    if read_config(folder).reads_weight:
        return ()
    try:
        return tuple(read_records(folder, places_in_base(folder)).updates.values())
    except NeedsBaseError:
        return ()


def _common_base(stored: Sequence[StoredAdapter]) -> str | None:
    """Return the name of the base that all adapters share, in the first one's spelling; None if they may have different
    bases.
    """
    first, *others = (adapter.config.base_model_name_or_path or "" for adapter in stored)
    return first if first and all(other and is_one_model(first, other) for other in others) else None


def _require_same_shapes(
    folders: Sequence[Path], stored: Sequence[StoredAdapter], sites: Mapping[str, LinearSite]
) -> None:
    for folder, adapter in zip(folders, stored, strict=True):
        for path, place in adapter.places.items():
            own = cast(LinearSite, place.site)
            shape, other = ((s.out_features, s.in_features, *s.window) for s in (own, sites[path]))
            if (shape, own.groups) != (other, sites[path].groups):
                raise CompositionError(
                    f"{folder} changes {path} as a layer of shape {shape}, another adapter as one of {other}: "
                    "they do not belong to the same base"
                )
