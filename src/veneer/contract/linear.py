"""The contract of methods at linear layers: embeddings and convolutions are linear maps too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.contract.checks import Checks
from veneer.contract.late_start import LateStart
from veneer.contract.parameters import Params, Shapes
from veneer.contract.targets import Names, TargetedConfig
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class LinearMethod(TargetedConfig):
    """A method at linear layers, each with parameters of its own.

    ``kinds`` are the modules that it can adapt: "linear" layers, "embedding", "convolution", "attention" (torch's own,
    both of its maps). ``outward`` names the parameters on the side of the output, as LoRA's B, which LoRA+ lets learn
    faster.
    """

    default_targets: ClassVar[tuple[str, ...]] = ("q", "v")  # as roles (Hu et al. 2021, section 4.2)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    outward: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def shapes(self, site: LinearSite) -> Shapes:
        """Names and shapes of the parameters trained at one site, in PEFT's shapes."""

    @abstractmethod
    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU, drawn from ``generator``."""

    @abstractmethod
    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        """The record that these parameters mean at this site."""

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        """For each parameter, what follows the module path in its key in ``adapter_model.safetensors``."""
        return {name: name for name in self.shapes(site)}

    @property
    def dropout(self) -> float:
        """Probability of zeroing an input of A in training."""
        return 0.0

    @property
    def largest_rank(self) -> int:
        """The largest rank of an update, as the written config tells it; 0 for a method that has none."""
        return 0

    @property
    def checks(self) -> Checks:
        """The checks of the method on the layers that it is to adapt."""
        return Checks()

    @property
    def late_start(self) -> LateStart | None:
        """The low-rank factors that may be started again on the model, where there are such."""
        return None

    def for_sites(self, sites: Sequence[LinearSite], defaults: Mapping[str, Names]) -> Self:
        """The config with what depends on all the layers that it adapts filled in; sites come as shapes.

        ``defaults``: of the fields of `fields_for` that are still None, the names that the model has; none where an
        adapter is read without its base.
        """
        return self

    def as_stored(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:
        """The config with what its file leaves open filled in from the parameters' shapes, by module path and name."""
        return self

    @property
    def reads_weight(self) -> bool:
        """True where ``lower`` needs the frozen weight of the site, and not its shape alone."""
        return False

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite | None:
        """A site of which name and kind are known, with the sizes that the shapes of its parameters tell; None where
        they do not tell both widths.
        """
        return None

    def ends(self) -> Mapping[str, str]:
        """The endings of keys in this config's file behind a module's path, and the kind of module that each tells."""
        sites = [
            LinearSite(name="", in_features=1, out_features=1),
            LinearSite(name="", in_features=1, out_features=1, kind="embedding"),
        ]
        return {
            end: site.kind
            for site in reversed(sites)
            if site.kind in self.kinds
            for end in self.disk_names(site).values()
        }

    def turned(self, params: Params) -> dict[str, Tensor]:
        """The parameters under which a head tied to the embeddings is changed by the transpose of their update.

        Asked of methods whose ``extras`` keep the tie.
        """
        return dict(params)

    @classmethod
    def of_records(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Self | None:
        """A config under which these records, by module path, are what the method lowers to; None where they cannot be.

        ``targets``: names that match exactly those paths.
        """
        return None

    def raised(self, site: LinearSite, record: LinearDelta) -> dict[str, Tensor]:
        """The inverse of ``lower`` under a config of `of_records`. A low-rank record's ``bias`` is what it adds to the
        layer's own.
        """
        raise NotImplementedError
