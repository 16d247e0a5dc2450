"""LLaMA-Adapter: in the upper layers attention to n trained embeddings, times a gate that starts at zero, is added to
attention to the sequence (Zhang et al. 2023, arXiv:2303.16199, section 3).

The base's own projections make keys and values of the embeddings, which have no positions. Difference from PEFT: the
bias of an output projection is added once (PEFT adds it again with the update), so that the start is the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import AttentionMethod, Params, Shapes
from veneer.records.deltas import AttendedDelta
from veneer.records.sites import AttendingSite

PROMPT, GATE = "adaption_prompt", "adaption_gate"


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(AttentionMethod):
    """Settings of LLaMA-Adapter, with the names that PEFT gives them.

    ``adapter_len`` is n, the number of embeddings, and ``adapter_layers`` the number of layers from the top.
    ``target_modules``: the last name of the attention modules; None is the family's own ("self_attn", GPT-2's "attn").
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    usual_learning_rate: ClassVar[float] = 1e-2
    inert: ClassVar[frozenset[str]] = frozenset({"target_modules", "adapter_len", "adapter_layers"})
    headline: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers")

    target_modules: str | None = None
    adapter_len: int
    adapter_layers: int

    def problems(self) -> list[str]:
        return super().problems() + [
            f"{name}={getattr(self, name)!r} must be a whole number of at least 1"
            for name in ("adapter_len", "adapter_layers")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]

    @property
    def attention_name(self) -> str | None:
        return self.target_modules

    @property
    def n_layers(self) -> int:
        return self.adapter_layers

    def shapes(self, site: AttendingSite) -> Shapes:
        return {PROMPT: (1, self.adapter_len, site.features), GATE: (1,)}

    def init(self, site: AttendingSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {PROMPT: torch.randn(self.shapes(site)[PROMPT], generator=generator), GATE: torch.zeros(1)}

    def lower(self, site: AttendingSite, params: Params) -> AttendedDelta:
        return AttendedDelta(prompt=params[PROMPT][0], gate=params[GATE])

    def site_of(self, site: AttendingSite, shapes: Mapping[str, tuple[int, ...]]) -> AttendingSite:
        return replace(site, features=shapes[PROMPT][2])
