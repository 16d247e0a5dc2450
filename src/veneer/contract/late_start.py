"""Initialization of low-rank factors from the model: from its data (EVA), or from its quantization error (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class LateStart:
    """Low-rank factors that may be initialized again once their adapter is on a model.

    ``a`` and ``b`` name A (r, i) and B (o, r) among the method's parameters. ``taken_off`` names A and B of the initial
    product, if that is subtracted. ``settings`` are those of an initialization from data, such as
    `inits.eva.EvaConfig`, or None if the config asks for none. ``is_product``: the update is exactly ``scale`` B A for
    any factors, so that they may start as any product. ``rank`` and ``scale`` return r and the factor of B A at a site.
    ``with_ranks`` returns the config's fields for sites and their new ranks, both by path. A site of rank 0 is dropped.
    If its last argument, ``keep_scale``, is true, ``scale`` stays. Otherwise it follows from the new rank.
    """

    a: str
    b: str
    taken_off: tuple[str, ...] = ()
    settings: object | None
    is_product: bool
    rank: Callable[[LinearSite], int]
    scale: Callable[[LinearSite], float]
    with_ranks: Callable[[Mapping[str, LinearSite], Mapping[str, int], bool], Mapping[str, object]]
