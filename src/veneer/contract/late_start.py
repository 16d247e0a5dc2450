"""Initialization of low-rank factors from the model: from its data (EVA), or from its quantization error (LoftQ)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class LateStart(ABC):
    """Low-rank factors that may be initialized again once their adapter is on a model.

    ``a`` and ``b`` name A (r, i) and B (o, r) among the method's parameters. ``taken_off`` names A and B of the initial
    product, if that is subtracted. ``settings`` are those of the initialization from data that the config asks for,
    such as `inits.eva.EvaConfig`; None if it asks for none.
    ``is_product``: the update is exactly `scale` B A for any factors, so that they may start as any product.
    """

    a: str
    b: str
    taken_off: tuple[str, ...] = ()
    settings: object | None
    is_product: bool

    @abstractmethod
    def rank(self, site: LinearSite) -> int:
        """Return the rank r at this site."""

    @abstractmethod
    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A at this site."""

    @abstractmethod
    def with_ranks(
        self, sites: Mapping[str, LinearSite], ranks: Mapping[str, int], keep_scale: bool
    ) -> Mapping[str, object]:
        """Return the config's fields for these ranks at these sites, both by path; one of rank 0 is no longer adapted.

        ``keep_scale``: `scale` stays the same; otherwise it follows from the new rank.
        """
