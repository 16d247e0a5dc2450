"""Plan of one adapter on a model, made from its config and one snapshot of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from veneer.contract import LinearMethod, MethodConfig, WholeMethod
from veneer.contract.extras import Extras
from veneer.contract.keys import OUT_PROJECTION
from veneer.contract.known import Known
from veneer.contract.targets import ALL_LINEAR, Names, absent_layers, present_targets, select_targets
from veneer.disk.known_name import known_name
from veneer.errors import TargetError, listed
from veneer.model.adapted.copies import copied_parameters, whole_parameters
from veneer.model.adapted.parameters import parameter_places
from veneer.model.adapted.token_rows import RowPlace, row_places
from veneer.model.adapted.tying import followers_of, unused_tie
from veneer.model.blueprint.names import TASK_HEADS
from veneer.model.blueprint.roles import names_for
from veneer.model.modules.experts import told_experts, with_experts
from veneer.model.modules.snapshot import Snapshot, shortest_names
from veneer.plain.module_names import matches_any
from veneer.records.sites import LinearSite

C = TypeVar("C", bound=MethodConfig)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AttachPlan:
    """Config of an adapter for one model, and the modules that it changes.

    ``targets``: the target layers, by path. ``outward``: the output projections of those targets that are attentions.
    ``followers``: the modules that use the factors of the ``embeddings``, a path, because they share its weight.
    ``parameters``: the parameters adapted by name, by module path. ``copied``: the parameters trained as a whole, by
    module path. ``rows``: the tables of which rows are trained.
    """

    config: MethodConfig
    targets: tuple[str, ...] = ()
    outward: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()
    embeddings: str = ""
    parameters: Mapping[str, tuple[str, ...]]
    copied: Mapping[str, list[str]]
    rows: tuple[RowPlace, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that get their own factors."""
        return tuple(dict.fromkeys((*self.targets, *self.outward)))

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all modules that the adapter touches."""
        with_rows = [path for place in self.rows for path in (place.path, *place.followers)]
        return tuple(dict.fromkeys([*self.layers, *self.followers, *self.parameters, *self.copied, *with_rows]))


def plan_beside(snapshot: Snapshot, config: MethodConfig, fresh: bool) -> AttachPlan:
    """Return the plan of a method that adapts no layers. It lists only the base's parameters that the adapter trains
    whole.
    """
    config = on_base(snapshot, config)
    copied = copied_parameters(snapshot.modules, snapshot.tied, config, set())
    return AttachPlan(config=config, parameters={}, copied=copied)


def plan_layers(snapshot: Snapshot, config: LinearMethod, fresh: bool) -> AttachPlan:
    """Return the plan of a method at linear layers. Raises TargetError with every problem.

    ``fresh``: the adapter is new, and every setting must have an effect; a saved one is accepted unchanged.
    """
    takes_all = _takes_all_linear(config)
    config = named(snapshot, with_experts(snapshot, on_base(snapshot, config)))
    modules, tied = snapshot.modules, snapshot.tied
    targets, followers = followers_of(tied, config, targets_of(snapshot, config))
    outward = tuple(f"{path}.{OUT_PROJECTION}" for path in targets if snapshot.kinds[path].name == "attention")
    copied = copied_parameters(modules, tied, config, {*targets, *outward})
    parameters, by_weight = parameter_places(modules, config, {*targets, *copied})
    plan = AttachPlan(
        config=config,
        targets=(*targets, *by_weight),
        outward=outward,
        followers=followers,
        embeddings=tied[0] if tied else "",
        parameters=parameters,
        copied=copied,
    )
    sites = snapshot.sites(plan.targets)
    _require_accepted(snapshot, config, plan, sites, fresh)
    left = told_experts(snapshot, config) if fresh and takes_all else None
    if left is not None:
        log.warning("%s", left)
    whole = (path for path, keys in copied.items() if "weight" in keys)
    rows = row_places(modules, tied, config.extras, {*plan.layers, *followers, *whole})
    return replace(plan, config=config.for_sites(sites, Known(names=left_out(snapshot, config))), rows=rows)


def plan_whole(snapshot: Snapshot, config: WholeMethod, fresh: bool) -> AttachPlan:
    """Return the plan of a method that trains its targets whole, or rows of them. Raises TargetError if the config
    names something that the model does not have or that cannot be trained.
    """
    config, index = on_base(snapshot, config), snapshot.wholes()
    copied = copied_parameters(snapshot.modules, snapshot.tied, config, set())
    if config.rows and config.target_modules is None:
        wanted: dict[str | None, tuple[int, ...]] = {None: config.rows}
    else:
        if config.target_modules is None:
            defaults = config.fields_for(snapshot.model_type)["target_modules"]
            config = replace(config, target_modules=present_targets(config, index, defaults))
        wanted = dict.fromkeys(select_targets(config, index), config.rows)
    if config.rows:
        extras = Extras(rows=wanted, rows_field="token_indices", draws_rows=config.draws_rows)
        rows = row_places(snapshot.modules, snapshot.tied, extras, copied)
        return AttachPlan(config=config, parameters={}, copied=copied, rows=rows)
    paths = [path for path in wanted if path is not None]
    return AttachPlan(config=config, parameters={}, copied={**copied, **whole_parameters(snapshot.modules, paths)})


def on_base(snapshot: Snapshot, config: C) -> C:
    """Return the config with the base's name and, for a classification task, the head among the modules to train."""
    changes: dict[str, object] = {}
    base = config.base_model_name_or_path or snapshot.base_name
    if base:
        changes["base_model_name_or_path"] = known_name(base)
    heads = [head for head in TASK_HEADS.get(config.task_type or "", ()) if head in snapshot.modules]
    missing = [head for head in heads if head not in (config.modules_to_save or ())]
    if missing:
        changes["modules_to_save"] = (*(config.modules_to_save or ()), *missing)
    return replace(config, **changes)  # type: ignore[arg-type]


def named(snapshot: Snapshot, config: LinearMethod) -> LinearMethod:
    """Return the config with default targets filled in: the method's own defaults, or the names for
    ``"all-linear"``.
    """
    if config.target_modules is None and not config.extras.parameters:
        return replace(config, target_modules=_default_targets(snapshot, config))
    if _takes_all_linear(config):
        return replace(config, target_modules=shortest_names(snapshot.index(), targets_of(snapshot, config)))
    return config


def _takes_all_linear(config: LinearMethod) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def left_out(snapshot: Snapshot, config: LinearMethod) -> dict[str, Names]:
    """Return values for those fields of a config that name modules and are None. The value is the method's default,
    with roles (such as q) replaced by the names of their layers in this model.
    """
    defaults = config.fields_for(snapshot.model_type)
    return {
        name: names if isinstance(names, str) else names_for(snapshot.model, names)
        for name, names in defaults.items()
        if getattr(config, name) is None
    }


def targets_of(snapshot: Snapshot, config: LinearMethod) -> tuple[str, ...]:
    """Return the module paths that a linear method's config matches in this model."""
    if config.extras.parameters and not config.target_modules:
        return ()
    return select_targets(config, snapshot.index(config))


def _default_targets(snapshot: Snapshot, config: LinearMethod) -> Names:
    names, index = left_out(snapshot, config)["target_modules"], snapshot.index(config)
    if isinstance(names, str):
        return names
    if config.takes_any_linear and not any(matches_any(path, names) for path in index.adaptable):
        return shortest_names(snapshot.index(), index.all_linear)
    return present_targets(config, index, names)


def _require_accepted(
    snapshot: Snapshot, config: LinearMethod, plan: AttachPlan, sites: list[LinearSite], fresh: bool
) -> None:
    """Raise TargetError with every reason why the method or the model refuses this plan. For a new adapter (``fresh``),
    also check that every setting has an effect, and log advice.
    """
    tied = snapshot.sites(snapshot.tied) if plan.followers else []
    wrong = [*config.checks.layers(sites), *config.checks.tied(tied), *_problems_of_invocation(snapshot, config, plan)]
    if fresh:
        named = [f"{path}.{key}" for path, keys in plan.parameters.items() for key in keys]
        wrong += [
            *unused_tie(snapshot.tied, config, {*plan.targets, *plan.copied}),
            *config.checks.effect([*plan.targets, *plan.followers, *named], sites),
            *absent_layers(config, snapshot.index(config)),
        ]
    if wrong:
        raise TargetError(listed(wrong))
    for odd in config.checks.advice(sites) if fresh else ():
        log.warning("%s", odd)


def _problems_of_invocation(snapshot: Snapshot, config: LinearMethod, plan: AttachPlan) -> list[str]:
    """Return the reasons why invocation tokens (aLoRA) cannot be used: targets other than linear layers, or a model
    with an encoder and a decoder.
    """
    if not config.invocation_tokens:
        return []
    whole = [path for path in plan.targets if snapshot.kinds[path].name != "linear"]
    found = [f"{path} is no linear layer, and invocation tokens need one: list it in exclude_modules" for path in whole]
    if getattr(getattr(snapshot.model, "config", None), "is_encoder_decoder", False):
        found.append(
            "the model has an encoder and a decoder, and invocation tokens need one sequence: leave "
            "alora_invocation_tokens out"
        )
    return found
