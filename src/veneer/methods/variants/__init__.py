"""Variants of LoRA, one file each: a class with functions on LoRA's parameters and record. A new file here adds one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.training import Training
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


class Variant(Training):
    """Variant that the field ``switch`` of a `LoraConfig` turns on, by True or by settings, which are then the variant.

    ``excludes``: fields with which it cannot be combined. ``whole``: fields that need A and B of plain LoRA.
    ``linear_only``: it acts only in linear layers. ``fixed`` parameters are never trained; ``outward`` are those of
    `LinearMethod.outward`. The update has ``ranks`` times LoRA's rank. ``is_product``: the update is the product of the
    variant's A and B. ``reads_weight``: `lower` needs the frozen weight. ``inert``: the switch alone does not change
    the update. ``has_penalty``: the variant adds `Training.penalty` to the loss of a run.
    """

    switch: ClassVar[str]
    whole: ClassVar[tuple[str, ...]] = (
        "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "alora_invocation_tokens",
    )  # fmt: skip
    excludes: ClassVar[tuple[str, ...]] = ()
    linear_only: ClassVar[bool] = False
    disk_names: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[tuple[str, ...]] = ()
    outward: ClassVar[tuple[str, ...]] = ()
    ranks: ClassVar[int] = 1
    is_product: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    inert: ClassVar[bool] = False
    has_penalty: ClassVar[bool] = False

    def refusals(self, config: Any) -> list[str]:
        """Return the problems of a `LoraConfig` with this variant, other than ``excludes``."""
        return []

    def refusals_at(self, config: Any, sites: Sequence[LinearSite]) -> list[str]:
        """Return the problems that the variant has with single layers, ``sites``."""
        wrong = [site for site in sites if self.linear_only and site.kind != "linear"]
        return [
            f"{self.switch} at {site.name}, which is no linear layer: leave it out of target_modules" for site in wrong
        ]

    def scaled(self, scale: float, r: int) -> float:
        """Return the variant's scale for this rank, given ``scale``, which is alpha / r."""
        return scale

    def read_site(self, config: Any, site: LinearSite) -> LinearSite:
        """Return the layer's description with the number of inputs that A reads."""
        return site

    def width(self, config: Any, site: LinearSite) -> int:
        """Return the number of the layer's inputs that A reads as one input."""
        return 1

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        """Return the shapes of the parameters that the variant adds or changes. ``shapes`` are those of plain LoRA."""
        return {}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        """Return initial values of the parameters that the variant adds or changes; ``params`` are plain LoRA's."""
        return {}

    def drawn(self, config: Any, site: LinearSite, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return the random numbers that a training pass needs in a layer; empty if it needs none."""
        return {}

    def derived(self, config: Any, site: LinearSite) -> dict[str, Tensor]:
        """Return tensors that are computed from the layer's frozen weight, which are not saved; empty if there are
        none.
        """
        return {}

    def of_pass(self, params: Params) -> Params:
        """Return the parameters with which a forward pass computes, for example with noise added."""
        return params

    def factors(self, config: Any, site: LinearSite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the variant's factors to plain LoRA's A (r, i) and B (o, r)."""
        return a, b

    def lower(self, config: Any, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
        """Return the record of the update, changed by the variant."""
        return record


def excluded(config: Any, names: Sequence[str], why: str) -> list[str]:
    """Return a problem for each of these fields that is set to something other than its default or an empty value."""
    given = {name: getattr(config, name) for name in names}
    defaults = {spec.name: spec.default for spec in fields(config)}
    return [f"{name}={x!r} does not go with {why}" for name, x in given.items() if x and x != defaults[name]]


for _file in pkgutil.iter_modules(__path__, f"{__name__}."):  # once, here: torch.compile cannot follow imports
    importlib.import_module(_file.name)
VARIANTS = tuple(Variant.__subclasses__())  # those of this folder, one a file


def variants_of(config: object) -> list[Variant]:
    """Return the variants that a config turns on."""
    given = [(kind, getattr(config, kind.switch)) for kind in VARIANTS]
    return [kind() if value is True else value for kind, value in given if value not in (None, False)]


def refusals(config: Any) -> list[str]:
    """Return a problem for each field that a variant excludes, and the other problems of the variants."""
    on = variants_of(config)
    found = [said for each in on for said in excluded(config, each.excludes, f"{each.switch}: leave it out")]
    return found + [said for each in on for said in each.refusals(config)]
