"""Conversion between PrefixDeltas, one for each attention layer, and their form on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.deltas import PrefixDelta
from veneer.records.sites import AttentionSite


def unflatten_prefix(flat: Float[Tensor, "n width"], sites: Sequence[AttentionSite]) -> tuple[PrefixDelta, ...]:
    """Return each attention layer's record from one matrix with a row for each virtual token.

    Its columns are the keys of the first layer, that layer's values, the keys of the next layer, and so on.
    """
    sizes = [site.kv_heads * site.head_dim for site in sites for _ in range(2)]
    chunks = torch.split(flat, sizes, dim=1)
    return tuple(
        PrefixDelta(
            k=keys.reshape(-1, site.kv_heads, site.head_dim), v=values.reshape(-1, site.kv_heads, site.head_dim)
        )
        for site, keys, values in zip(sites, chunks[0::2], chunks[1::2], strict=True)
    )


def flatten_prefix(records: Sequence[PrefixDelta]) -> Float[Tensor, "n width"]:
    """Return the matrix (virtual tokens, `prefix_width`) of the layers' records: the inverse of `unflatten_prefix`."""
    return torch.cat([part.flatten(1) for record in records for part in (record.k, record.v)], dim=1)


def prefix_width(sites: Sequence[AttentionSite]) -> int:
    """Return the count of numbers in one virtual token: ``Σ 2 kv_heads head_dim`` over the layers."""
    return sum(2 * site.kv_heads * site.head_dim for site in sites)
