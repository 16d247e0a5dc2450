"""Prefix tuning: n trained key/value pairs in front of the sequence in every attention layer (Li & Liang 2021,
arXiv:2101.00190, section 4.2).

The pairs are trained as they are, or made by an MLP from n small vectors (section 4.3, eq. 3). The keys count as
rotated already; real tokens take positions from n on. A plain save holds the keys and values in one matrix in both
cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import Params, PrefixMethod, Shapes
from veneer.records.deltas import PrefixDelta
from veneer.records.prefix import prefix_width, unflatten_prefix
from veneer.records.sites import AttentionSite

STORED = "prompt_embeddings"
NETWORK = {
    "embedding": "prompt_encoder.embedding.weight",
    "inner_weight": "prompt_encoder.transform.0.weight",
    "inner_bias": "prompt_encoder.transform.0.bias",
    "outer_weight": "prompt_encoder.transform.2.weight",
    "outer_bias": "prompt_encoder.transform.2.bias",
}


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PrefixMethod):
    """Settings of prefix tuning, with the names that PEFT gives them.

    ``num_virtual_tokens`` is n, the number of pairs. ``prefix_projection``: in training, an MLP with
    ``encoder_hidden_size`` inner units computes the prefix; None means as many units as one layer's keys are wide.
    ``init_weights``: None (normal) or "zero".
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset({"prefix_projection", "encoder_hidden_size", "init_weights"})

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    def shapes(self, sites: Sequence[AttentionSite]) -> Shapes:
        n, width = self.num_virtual_tokens, prefix_width(sites)
        if not self.has_network:
            return {STORED: (n, width)}
        d = sites[0].kv_heads * sites[0].head_dim
        h = d if self.encoder_hidden_size is None else self.encoder_hidden_size
        sizes = ((n, d), (h, d), (h,), (width, h), (width,))
        return dict(zip(NETWORK, sizes, strict=True))

    def init(self, sites: Sequence[AttentionSite], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        for name, shape in self.shapes(sites).items():
            if name in (STORED, "embedding"):
                params[name] = torch.randn(shape, generator=generator)
            else:  # torch's own start of a linear layer: uniform in ±1/√fan_in, weight and bias
                bound = 1 / math.sqrt(
                    params[f"{name.partition('_')[0]}_weight"].shape[1] if len(shape) == 1 else shape[1]
                )
                params[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        zeroed = (STORED,) if not self.has_network else ("outer_weight", "outer_bias")
        if self.init_weights == "zero":
            params |= {name: torch.zeros_like(params[name]) for name in zeroed}
        return params

    def lower(self, sites: Sequence[AttentionSite], params: Params) -> tuple[PrefixDelta, ...]:
        found = unflatten_prefix(self.stored(sites, params)[STORED], sites)
        return tuple(found[_stored_layer(sites, index)] for index in range(len(sites)))

    def lower_one(self, sites: Sequence[AttentionSite], params: Params, index: int) -> PrefixDelta:
        index = _stored_layer(sites, index)
        start, width = prefix_width(sites[:index]), prefix_width(sites[index : index + 1])
        part = slice(start, start + width)
        if not self.has_network:
            flat = params[STORED][:, part]
        else:
            rows = {"outer_weight": params["outer_weight"][part], "outer_bias": params["outer_bias"][part]}
            flat = self.stored(sites, {**params, **rows})[STORED]
        return unflatten_prefix(flat, sites[index : index + 1])[0]

    def stored(self, sites: Sequence[AttentionSite], params: Params) -> dict[str, Tensor]:
        if not self.has_network:
            return {STORED: params[STORED]}
        inner = torch.tanh(
            torch.nn.functional.linear(params["embedding"], params["inner_weight"], params["inner_bias"])
        )
        return {STORED: torch.nn.functional.linear(inner, params["outer_weight"], params["outer_bias"])}

    @property
    def has_network(self) -> bool:
        return self.prefix_projection and not self.inference_mode

    def disk_names(self, site: Sequence[AttentionSite]) -> dict[str, str]:
        return NETWORK if self.has_network else {STORED: STORED}


def _stored_layer(sites: Sequence[AttentionSite], index: int) -> int:
    """Return the index of the stored layer that layer i reads. It is i, or 2 i mod L if the layer has cross-attention,
    as in PEFT.

    PEFT repeats the stored matrices, takes four of them for each layer, and drops the two for cross-attention. If the
    number L of layers is even, this leaves every other stored layer unused. It is kept, because PEFT's files are
    trained so.
    """
    return 2 * index % len(sites) if sites[index].cross else index
