"""LoRA: ``W + (alpha / r) B A`` with A (r, i) and B (o, r) trained (Hu et al. 2021, arXiv:2106.09685, eq. 3).

LoRA's variants (rsLoRA, DoRA, …) are functions on its record. Each is a module beside this one with

- ``SWITCH``: the field of `LoraConfig` that turns it on;
- optionally ``shapes(config, site)`` and ``init(config, site, factors)`` for parameters that it adds;
- ``lower(config, site, params, record)``: the record after the variant.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from veneer.core.method import LinearMethod, Params, Shapes
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.inits import lowrank

T = TypeVar("T")

STARTS = {True: lowrank.kaiming, "gaussian": lowrank.gaussian, False: lowrank.random}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LinearMethod):
    """LoRA and its variants, in PEFT's fields.

    ``rank_pattern`` and ``alpha_pattern`` override r and alpha where the module path ends with a key (a regular
    expression).
    ``bias``: which biases of the base are trained too: "none", "all", or those of the adapted layers ("lora_only").
    ``init_lora_weights``: True (Kaiming A, zero B), "gaussian", or False (both random: the start changes the model).
    ``fan_in_fan_out`` is read for compatibility; a layer that stores Wᵀ is recognised by its type.
    """

    peft_type: ClassVar[str] = "LORA"
    adapts_embeddings: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                found.append(f"{name}={r!r} must be a whole number of at least 1")
        for name, alpha in {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }.items():
            if not math.isfinite(alpha) or alpha == 0:
                found.append(f"{name}={alpha!r} must be a finite number other than 0")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            found.append(f"bias={self.bias!r} must be 'none', 'all' or 'lora_only'")
        if self.init_lora_weights not in STARTS:
            found.append(f"init_lora_weights={self.init_lora_weights!r} must be one of {list(STARTS)}")
        return found

    def rank(self, site: LinearSite) -> int:
        """r at this site."""
        return _override(self.rank_pattern, site.name, self.r)

    def scale(self, site: LinearSite) -> float:
        """alpha / r at this site, before any variant."""
        return _override(self.alpha_pattern, site.name, self.lora_alpha) / self.rank(site)

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.rank(site)
        shapes: Shapes = {"lora_A": (r, site.in_features), "lora_B": (site.out_features, r)}
        for variant in self._variants():
            shapes |= variant.shapes(self, site) if hasattr(variant, "shapes") else {}
        return shapes

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        a, b = STARTS[self.init_lora_weights](self.rank(site), site.in_features, site.out_features, generator)
        if site.kind == "embedding" and self.init_lora_weights in (True, "gaussian"):
            # PEFT's start for embeddings: rows of A are looked up, so A is the zero factor and B the random one.
            a, b = torch.zeros_like(a), torch.randn(b.shape, generator=generator)
        params = {"lora_A": a, "lora_B": b}
        for variant in self._variants():
            params |= variant.init(self, site, params) if hasattr(variant, "init") else {}
        return params

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        record = LinearDelta(a=params["lora_A"], b=params["lora_B"], scale=self.scale(site))
        for variant in self._variants():
            record = variant.lower(self, site, params, record)
        return record

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        factors = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
        if site.kind == "embedding":
            factors = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {name: factors.get(name, name) for name in self.shapes(site)}

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def trained_biases(self) -> str:
        return self.bias

    def _variants(self) -> list[ModuleType]:
        return [variant for variant in _all_variants() if getattr(self, variant.SWITCH)]


@functools.cache
def _all_variants() -> tuple[ModuleType, ...]:
    """The modules beside this one that declare a SWITCH, by ORDER: what rescales comes before what reads the scale."""
    package = __name__.rpartition(".")[0]
    path = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)]
    return tuple(sorted((m for m in modules if hasattr(m, "SWITCH")), key=lambda m: m.ORDER))


def _override(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key that matches the end of the module path, as PEFT matches it."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)
