"""IA3: vectors rescale keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

A vector l multiplies the output of a layer (bias included), or its input for ``feedforward_modules``. At a convolution
it multiplies the channels. It starts at one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import SCALING
from veneer.contract.known import Known
from veneer.contract.peft_fields import PeftFields
from veneer.contract.raised import Raised
from veneer.contract.targets import FamilyTargets, Names
from veneer.errors import CompositionError
from veneer.plain.module_names import matches_any
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.scale import Scale


@dataclass(frozen=True, kw_only=True)
class IA3Config(LinearMethod):
    """Settings of IA3, with the names that PEFT gives them.

    ``feedforward_modules``, whose input is scaled, must be among ``target_modules``.

    If ``feedforward_modules`` is left out, it is found when the adapter is attached: the target layers that project
    back from the feed-forward width.
    """

    peft_type: ClassVar[str] = "IA3"
    headline: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    usual_learning_rate: ClassVar[float] = 5e-3
    default_targets: ClassVar[tuple[str, ...]] = ("k", "v", "down")
    family_targets: ClassVar[FamilyTargets] = SCALING
    inert: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_ia3_weights"})
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("layers_pattern", "layers_to_transform"))

    feedforward_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        if isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple):
            stray = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if stray:
                found.append(
                    f"feedforward_modules {stray} are not among target_modules {list(self.target_modules)}: "
                    "add them there"
                )
        return found

    @classmethod
    def fields_for(cls, model_type: str) -> Mapping[str, Names]:
        return {"feedforward_modules": ("down",), **super().fields_for(model_type)}

    @property
    def checks(self) -> Checks:
        return _Checks(self.feedforward_modules or ())

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        """Return the config with ``feedforward_modules`` in PEFT's form: among ``target_modules``, and never None.

        The entries are whole paths if names do not determine the layers, or if ``layers_to_transform`` is set, which
        PEFT's IA3 does not have. If the config is read with a file and lacks the field, it is filled with the targets
        whose vectors are rows, (1, i). A convolution's vector, (1, channels, 1, …), does not tell; it is taken to scale
        outputs.
        """
        if known.shapes and self.feedforward_modules is None:
            scaled_by_rows = {p: own["ia3_l"] for p, own in known.shapes.items() if len(own["ia3_l"]) == 2}
            rows = tuple(path for path, shape in scaled_by_rows.items() if shape[0] == 1)
            return replace(self, target_modules=tuple(known.shapes), feedforward_modules=rows)
        paths, inward = [site.name for site in sites], known.names.get("feedforward_modules", self.feedforward_modules)
        if inward is None:
            return self
        scaled = [path for path in paths if matches_any(path, inward)]
        if self.layers_to_transform is None:
            if self.feedforward_modules is not None:
                return self
            targets = self.target_modules if isinstance(self.target_modules, tuple) else tuple(inward)
            named = tuple(name for name in targets if _means(name, paths) and _means(name, paths) <= set(scaled))
            if {path for name in named for path in _means(name, paths)} == set(scaled):
                return replace(self, feedforward_modules=named)
        return replace(
            self,
            target_modules=tuple(paths),
            feedforward_modules=tuple(scaled),
            layers_to_transform=None,
            layers_pattern=None,
        )

    def shapes(self, site: LinearSite) -> Shapes:
        scales_input = self._scales_input(site)
        if site.kind == "convolution":
            channels = site.in_features // math.prod(site.window) if scales_input else site.out_features
            return {"ia3_l": (1, channels, *[1] * len(site.window))}
        return {"ia3_l": (1, site.in_features) if scales_input else (site.out_features, 1)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        (shape,) = self.shapes(site).values()
        return {"ia3_l": torch.ones(shape) if self.init_ia3_weights else torch.randn(shape, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        vector = params["ia3_l"].flatten()
        if self._scales_input(site):
            return LinearDelta(input=Scale(vector.repeat_interleave(math.prod(site.window))))
        return LinearDelta(output=Scale(vector), bias=None if site.bias is None else site.bias * vector)

    @classmethod
    def raised(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Raised | None:
        if not all(r.only_scales and (r.input is None) != (r.output is None) for r in records.values()):
            return None
        inputs = tuple(path for path, record in records.items() if record.input is not None)
        return Raised(cls(target_modules=tuple(records), feedforward_modules=inputs), _parameters)

    def _scales_input(self, site: LinearSite) -> bool:
        return matches_any(site.name, self.feedforward_modules or ())


def _means(name: str, paths: Sequence[str]) -> set[str]:
    """Return the paths that a name or suffix matches."""
    return {path for path in paths if matches_any(path, (name,))}


def _parameters(site: LinearSite, record: LinearDelta) -> dict[str, Tensor]:
    if record.input_scale is not None:  # a channel has one scale for all places of the window
        return {"ia3_l": record.input_scale[None, :: math.prod(site.window)]}
    if record.output_scale is None:
        raise CompositionError(
            f"the record at {site.name} scales neither inputs nor outputs: an update of IA3 must scale one of them"
        )
    return {"ia3_l": record.output_scale[:, None]}


@dataclass(frozen=True)
class _Checks(Checks):
    """Checks that each name in ``feedforward_modules`` matches an adapted module."""

    feedforward: Collection[str] | str

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        given = self.feedforward
        patterns = [(given, given)] if isinstance(given, str) else [(pattern, (pattern,)) for pattern in given]
        return [
            f"feedforward_modules {shown!r} matches none of the {len(names)} modules adapted, such as {names[0]!r}"
            for shown, pattern in patterns
            if pattern and not any(matches_any(name, pattern) for name in names)
        ]
