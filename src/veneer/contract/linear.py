"""Contract of methods that change linear layers. Embeddings and convolutions count as linear layers too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.contract.checks import Checks
from veneer.contract.extras import Extras
from veneer.contract.keys import Place
from veneer.contract.parameters import Params, Shapes
from veneer.contract.places import REPEATS, Placed, ShapesByKey, module_places
from veneer.contract.raised import Raised
from veneer.contract.targets import TargetedConfig
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_SAMPLES = (
    LinearSite(name="", in_features=1, out_features=1),
    LinearSite(name="", in_features=1, out_features=1, kind="embedding"),
)


@dataclass(frozen=True, kw_only=True)
class LinearMethod(TargetedConfig):
    """Method that changes linear layers, with its own parameters in each.

    ``kinds`` are the modules that it can adapt: "linear" layers, "embedding", "convolution", "attention" (torch's own,
    both of its maps). ``outward`` names the parameters on the output side, such as LoRA's B. LoRA+ gives them a higher
    learning rate. A field ``bias`` is PEFT's: "none", "all", or "…_only" for the biases of the adapted layers.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    outward: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def shapes(self, site: LinearSite) -> Shapes: ...

    @abstractmethod
    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    @abstractmethod
    def lower(self, site: LinearSite, params: Params) -> LinearDelta: ...

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the random numbers that a training pass needs at a site, on the CPU. ``lower`` then has them in
        ``params``.

        Return an empty dict for a method without random numbers. If they are not in ``params``, ``lower`` returns the
        record for evaluation and merging.
        """
        return {}

    @property
    def extras(self) -> Extras:
        bias: Any = getattr(self, "bias", "none")
        return replace(super().extras, biases="adapted" if bias.endswith("_only") else bias)

    @property
    def checks(self) -> Checks:
        """Checks of the method on the layers that it adapts."""
        return Checks()

    @classmethod
    def raised(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Raised | None:
        """Return an adapter of this method whose records are ``records``, by module path, or None if this method has no
        such adapter.

        ``targets``: names that match exactly these paths. Combined adapters are stored in this way.
        """
        return None

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        return tuple(site for site in _SAMPLES if site.kind in self.kinds)

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        if self.extras.parameters:  # which of a module's parameters a key means, its order in the module tells
            return None
        return module_places(self, shapes, source, _named)


def _named(sample: LinearSite, place: Place) -> LinearSite:
    if place.of_attention:
        return replace(sample, name=place.path.rpartition(".")[0], repeats=REPEATS)
    return replace(sample, name=place.path)
