"""Bottleneck adapters: ``h + scale * (W_up act(W_down x + b_down) + b_up)`` after a sub-layer, before its residual add.

Three placements of one formula, ``2 d r + r + d`` parameters each:

- Houlsby et al. 2019 (arXiv:1902.00751, section 2.1): after attention and after the feed-forward part, x = h;
- Pfeiffer et al. 2021 (AdapterFusion, arXiv:2005.00247, section 4.1): after the feed-forward part only, x = h;
- He et al. 2022 (arXiv:2110.04366, section 4.3): parallel to the feed-forward part, x is that part's input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from veneer.contract import Params, ResidualMethod, Shapes
from veneer.inits import bottleneck
from veneer.records.deltas import ResidualDelta
from veneer.records.residual import ACTIVATIONS, bottleneck_width
from veneer.records.sites import ResidualSite

PRESETS: Mapping[str, dict[str, Any]] = {
    "houlsby": {"after_attention": True, "non_linearity": "swish"},
    "pfeiffer": {},
    "parallel": {"placement": "parallel", "reduction_factor": 2, "scaling": 4.0, "init_weights": "mam_adapter"},
}
STARTS = {"bert": bottleneck.bert, "mam_adapter": bottleneck.mam, "houlsby": bottleneck.houlsby}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(ResidualMethod):
    """Bottleneck adapters; Pfeiffer's by default. `houlsby` and `parallel` give the other papers' settings.

    ``after_attention``, ``after_mlp``, ``after_cross_attention`` choose the sub-layers that get one.
    ``placement``: "serial" (x = h) or "parallel" (x is the sub-layer's input).
    ``size`` is the inner width r; if it is None, r is ``features // reduction_factor``.
    ``init_weights``: "bert", "mam_adapter" (exactly the identity) or "houlsby".
    ``layers_to_transform``: indices of the blocks that get one; None means all blocks.
    ``dropout``: probability of zeroing an output of the bottleneck in training.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    headline: ClassVar[tuple[str, ...]] = ("after_attention", "after_mlp", "placement", "reduction_factor")
    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset(
        {"after_attention", "after_mlp", "after_cross_attention", "size", "reduction_factor", "init_weights", "dropout"}
        | {"layers_to_transform"}
    )

    after_attention: bool = False
    after_mlp: bool = True
    after_cross_attention: bool = False
    placement: Literal["serial", "parallel"] = "serial"
    size: int | None = None
    reduction_factor: float = 16
    non_linearity: str = "relu"
    scaling: float = 1.0
    init_weights: str = "bert"
    dropout: float = 0.0
    layers_to_transform: Collection[int] | int | None = None

    @classmethod
    def houlsby(cls, **fields: object) -> Self:
        """Return Houlsby's settings: after attention and after the feed-forward part, swish."""
        return cls(**PRESETS["houlsby"] | fields)

    @classmethod
    def pfeiffer(cls, **fields: object) -> Self:
        """Return Pfeiffer's settings: after the feed-forward part, ReLU."""
        return cls(**PRESETS["pfeiffer"] | fields)

    @classmethod
    def parallel(cls, **fields: object) -> Self:
        """Return the settings of He et al. (2022): the bottleneck is parallel to the feed-forward part, half as wide as
        the residual stream, scaled by 4, and the identity at the start.
        """
        return cls(**PRESETS["parallel"] | fields)

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        return PRESETS

    def problems(self) -> list[str]:
        found = super().problems()
        if not (self.after_attention or self.after_mlp or self.after_cross_attention):
            found.append("no place for a bottleneck: set after_attention, after_mlp or after_cross_attention")
        if self.size is not None and self.size < 1:
            found.append(f"size={self.size!r} must be a whole number of at least 1, or None")
        if self.reduction_factor <= 0:
            found.append(f"reduction_factor={self.reduction_factor!r} must be a finite number above 0")
        if self.non_linearity not in ACTIVATIONS:
            found.append(f"non_linearity={self.non_linearity!r} must be one of {sorted(ACTIVATIONS)}")
        if self.scaling == 0:
            found.append(f"scaling={self.scaling!r} must be a finite number other than 0")
        if self.init_weights not in STARTS:
            found.append(f"init_weights={self.init_weights!r} must be one of {sorted(STARTS)}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout={self.dropout!r} must lie in [0, 1)")
        return found

    @property
    def sublayers(self) -> tuple[str, ...]:
        places = {
            "attention": self.after_attention,
            "cross_attention": self.after_cross_attention,
            "mlp": self.after_mlp,
        }
        return tuple(name for name, wanted in places.items() if wanted)

    @property
    def layers(self) -> tuple[int, ...] | None:
        wanted = self.layers_to_transform
        return (wanted,) if isinstance(wanted, int) else None if wanted is None else tuple(wanted)

    def width(self, site: ResidualSite) -> int:
        """Return the inner width r of the bottleneck after this sub-layer."""
        return bottleneck_width(site.features, self.reduction_factor) if self.size is None else self.size

    def shapes(self, site: ResidualSite) -> Shapes:
        r, d = self.width(site), site.features
        return {"down": (r, d), "down_bias": (r,), "up": (d, r), "up_bias": (d,)}

    def init(self, site: ResidualSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        r, d = self.width(site), site.features
        down, up = STARTS[self.init_weights](r, d, generator)
        return {"down": down, "down_bias": torch.zeros(r), "up": up, "up_bias": torch.zeros(d)}

    def lower(self, site: ResidualSite, params: Params) -> ResidualDelta:
        return ResidualDelta(
            down=params["down"],
            up=params["up"],
            down_bias=params["down_bias"],
            up_bias=params["up_bias"],
            activation=self.non_linearity,
            scale=self.scaling,
            where=self.placement,
        )

    def disk_names(self, site: ResidualSite) -> dict[str, str]:
        return {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}

    def site_of(self, site: ResidualSite, shapes: Mapping[str, tuple[int, ...]]) -> ResidualSite:
        return replace(site, features=shapes["down"][1])
