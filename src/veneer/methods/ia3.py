"""IA3: vectors rescale keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

A vector l multiplies the output of a layer (bias included), or, for ``feedforward_modules``, its input; of a
convolution, the channels. It starts at one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.core.method import LinearMethod, Params, Shapes
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.targets import matches_any


@dataclass(frozen=True, kw_only=True)
class IA3Config(LinearMethod):
    """IA3 in PEFT's fields. ``feedforward_modules`` must be among ``target_modules``: those scale their input.

    Left out, they are the layers that project back from the feed-forward width, by the names that families give them.
    """

    peft_type: ClassVar[str] = "IA3"
    adapts_convolutions: ClassVar[bool] = True
    usual_learning_rate: ClassVar[float] = 5e-3
    default_feedforward: ClassVar[tuple[str, ...]] = (
        "down_proj", "fc2", "output.dense", "wo", "dense_4h_to_h", "mlp.c_proj", "w2",
    )  # fmt: skip
    default_targets: ClassVar[tuple[str, ...]] = (
        "k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj", "query_key_value", "c_attn",
        *default_feedforward,
    )  # fmt: skip

    feedforward_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        if isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple):
            stray = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if stray:
                found.append(
                    f"feedforward_modules {stray} are not among target_modules {list(self.target_modules)}: "
                    "add them there"
                )
        return found

    def unused(self, names: Sequence[str]) -> list[str]:
        given = self.feedforward_modules or ()
        patterns = [(given, given)] if isinstance(given, str) else [(pattern, (pattern,)) for pattern in given]
        return [
            f"feedforward_modules {shown!r} matches none of the {len(names)} modules adapted, such as {names[0]!r}"
            for shown, pattern in patterns
            if not any(matches_any(name, pattern) for name in names)
        ]

    def for_sites(self, sites: Sequence[LinearSite]) -> IA3Config:
        """Chosen layers become whole paths, which PEFT, whose IA3 cannot choose layers, reads the same."""
        if self.layers_to_transform is None:
            return self
        return replace(
            self,
            target_modules=tuple(site.name for site in sites),
            feedforward_modules=tuple(site.name for site in sites if self._scales_input(site)),
            layers_to_transform=None,
            layers_pattern=None,
        )

    def shapes(self, site: LinearSite) -> Shapes:
        scales_input = self._scales_input(site)
        if site.kind == "convolution":
            channels = site.in_features // math.prod(site.window) if scales_input else site.out_features
            return {"ia3_l": (1, channels, *[1] * len(site.window))}
        return {"ia3_l": (1, site.in_features) if scales_input else (site.out_features, 1)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        (shape,) = self.shapes(site).values()
        return {"ia3_l": torch.ones(shape) if self.init_ia3_weights else torch.randn(shape, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        vector = params["ia3_l"].flatten()
        if self._scales_input(site):
            return LinearDelta(in_scale=vector.repeat_interleave(math.prod(site.window)))
        return LinearDelta(out_scale=vector, bias=None if site.bias is None else site.bias * vector)

    def _scales_input(self, site: LinearSite) -> bool:
        patterns = self.default_feedforward if self.feedforward_modules is None else self.feedforward_modules
        return matches_any(site.name, patterns)
