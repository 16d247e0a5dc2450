"""DoRA: ``m (W + s B A) / |W + s B A|``, magnitude m trained per output row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

The norm is constant for the gradient (section 4.3), so the record is LoRA's with ``m / norm`` as the scale of its
outputs. The norms are computed from products with A and B; the matrix B A is never formed.
Difference from PEFT: in training with dropout, PEFT computes W on the dropped input as well. Here, as in torchtune,
dropout acts only on the input of A. For grouped convolutions the norms are PEFT's, so that its files keep their
meaning: those of ``W + s X``. X is the product of A and of B, read as a matrix (o / groups, r), itself read as a matrix
(o, i / groups) like W's blocks. The kernel has no such update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.contract.needed import needed_weight
from veneer.contract.parameters import Params, Shapes
from veneer.methods.variants import Variant
from veneer.ops.linear.row_norms import row_norms
from veneer.records.channel_groups import diagonal_blocks
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite
from veneer.records.terms.pair import Pair
from veneer.records.terms.scale import Scale


class Dora(Variant):
    """DoRA as a variant of LoRA, with the magnitude as one more parameter."""

    switch = "use_dora"
    excludes = ("lora_bias",)
    reads_weight = True

    def refusals(self, config: Any) -> list[str]:
        start = config.init_lora_weights
        told = f"init_lora_weights={start!r} and use_dora exclude each other, as in PEFT: leave one out"
        return [told] if config.start is not None and config.start.keeps_b else []

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        of_convolution = (1, site.out_features, *[1] * len(site.window))
        return {"lora_magnitude_vector": of_convolution if site.window else (site.out_features,)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        """Return the magnitudes: the row norms of the weight with the initial factors, so that the start changes
        nothing.
        """
        start = config.lower(site, {**params, "lora_magnitude_vector": torch.ones(site.out_features)})
        shapes = self.shapes(config, site, {})
        return {name: _norms(site, start).float().cpu().view(shape) for name, shape in shapes.items()}

    def lower(self, config: Any, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
        magnitude = params["lora_magnitude_vector"].flatten()
        # A row of zeros has no direction and magnitude 0: it stays zero instead of becoming 0 / 0.
        norms = _norms(site, record, torch.finfo(magnitude.dtype).tiny).to(magnitude.device)
        return replace(record, output=Scale(magnitude / norms))


@torch.no_grad()
def _norms(site: LinearSite, record: LinearDelta, least: float = 0.0) -> Tensor:
    """Return the row norms of the changed weight, each at least ``least``, on the weight's device."""
    weight = needed_weight(site, "DoRA")
    assert site.row_sq is not None  # a site with a weight has its norms
    assert record.low_rank is not None  # LoRA's record is a pair
    row_sq = site.row_sq()
    plain = record.low_rank.plain
    pair = Pair(a=plain.a.to(row_sq.device), b=plain.b.to(row_sq.device), scale=plain.scale)
    if site.groups > 1:
        return _norms_in_groups(weight, pair, site.groups).clamp_min(least)
    return row_norms(row_sq, weight.matmul(pair.a), pair.a, pair.b, pair.scale, least=least)


def _norms_in_groups(weight: FrozenWeight, pair: Pair, groups: int) -> Tensor:
    own = diagonal_blocks(weight.dense(torch.promote_types(pair.b.dtype, torch.float32)), groups)
    b = diagonal_blocks(pair.b, groups).reshape(-1, pair.rank)
    norms: Tensor = (own + pair.scale * (b @ pair.a).view_as(own)).norm(dim=1)
    return norms
