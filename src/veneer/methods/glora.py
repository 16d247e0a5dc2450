"""GLoRA: ``W + W ⊙ A + B`` and a bias ``c + c ⊙ D + E + W C`` (Chavan et al. 2023, arXiv:2306.07967, eq. 10).

Each of A to E is a matrix, a vector, a number, or left out. B is a low-rank pair. A multiplies the weight entrywise, so
that the update depends on the weight of its base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.errors import ConfigError
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.base import Base
from veneer.records.terms.change import Change
from veneer.records.terms.hadamard import Hadamard
from veneer.records.terms.pair import Pair

_STD = 0.02  # PEFT's, of a number that starts away from zero
_OF_BIAS = ("glora_C_X", "glora_D_X", "glora_E_X")


@dataclass(frozen=True, kw_only=True)
class GloraConfig(LinearMethod):
    """Settings of GLoRA, with the names that PEFT gives them.

    ``config_A_B``, ``config_C`` and ``config_D_E`` choose the form of A and B, of C, and of D and E. "lora" is a
    product of rank r, "vector" a number for each output (for C, each input), "constant" one number, and "none" leaves
    the part out. C, D and E act in layers that have a bias. ``init_weights`` starts all parts at zero. False draws them
    at random, so that the start changes the model.
    """

    peft_type: ClassVar[str] = "GLORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "config_A_B", "config_C", "config_D_E", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"glora_A_Xd", "glora_B_Xd"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules", "layers_pattern", "layers_to_transform"))
    inert: ClassVar[frozenset[str]] = frozenset({"r", "bias", "config_A_B", "config_C", "config_D_E", "init_weights"})

    r: int = 8
    bias: Literal["none", "all", "glora_only"] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815 - PEFT's name
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815 - PEFT's name
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815 - PEFT's name
    init_weights: bool = True

    def problems(self) -> list[str]:
        return super().problems() + below_one({"r": self.r})

    @property
    def largest_rank(self) -> int:
        return {"lora": self.r, "none": 0}.get(self.config_A_B, 1)

    @property
    def reads_weight(self) -> bool:
        return self.config_A_B != "none" or self.config_C != "none"

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        """Example layers, without a bias and with one: their files have different keys."""
        return tuple(LinearSite(name="", in_features=1, out_features=1, has_bias=has) for has in (False, True))

    @property
    def packing(self) -> Packing:
        """Packing that writes zeros for the parts that the config leaves out, as PEFT's files do."""
        return Packing(fixed=tuple(f"glora_{path}_zeros" for path in "ABCDE"))

    def shapes(self, site: LinearSite) -> Shapes:
        return {
            f"glora_{path}_{part}": shape
            for path, kind in self._kinds(site).items()
            for part, shape in self._parts(path, kind, site).items()
        }

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: ".".join(name.rsplit("_", 1)) for name in self.shapes(site)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, kind in self._kinds(site).items():
            for part, shape in self._parts(path, kind, site).items():
                value = torch.zeros(shape)
                if part == "Xu" or (part != "zeros" and not self.init_weights):
                    value = kaiming_uniform((1, *shape)[-2:], generator).view(shape)
                    value = torch.randn(shape, generator=generator) * _STD if kind == "constant" else value
                found[f"glora_{path}_{part}"] = value
        return found

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        if self.reads_weight:
            needed_weight(site, "GLoRA")
        return LinearDelta(adds=self._adds(site, params), bias=self._bias(site, params))

    def _kinds(self, site: LinearSite) -> dict[str, str]:
        """Return the kind of each part, A to E, by its letter. C, D and E act on the bias, so they are "none" in a
        layer without a bias.
        """
        of_bias = (self.config_C, self.config_D_E, self.config_D_E) if site.has_bias else ("none",) * 3
        return dict(zip("ABCDE", (self.config_A_B, self.config_A_B, *of_bias), strict=True))

    def _parts(self, path: str, kind: str, site: LinearSite) -> Shapes:
        """Return the shapes of one part, A to E. D and E are vectors: a number for each output."""
        o, i = site.out_features, site.in_features
        rows, *columns = {"A": (o, i), "B": (o, i), "C": (i, 1)}.get(path, (o,))
        of_kind: dict[str, Shapes] = {
            "lora": {"Xd": (rows, self.r), "Xu": (self.r, *columns)},
            "vector": {"X": (rows, 1)[: 1 + len(columns)]},
            "constant": {"X": (1,)},
            "none": {"zeros": (rows, *columns)},
        }
        return of_kind[kind]

    def _adds(self, site: LinearSite, params: Params) -> tuple[Pair | Change, ...]:
        if site.weight is None or self.config_A_B == "none":
            return ()
        (b_d, b_u), (a_d, a_u) = (self._factors(path, site, params) for path in "BA")
        return Pair(a=b_u, b=b_d), Hadamard(a=a_u, b=a_d, base=Base(site.weight))

    def _factors(
        self, path: str, site: LinearSite, params: Params
    ) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
        """Return the two factors of part A or B. If the part is one column or one number, it is repeated over all
        inputs as a matrix of rank 1.
        """
        if self.config_A_B == "lora":
            b, a = params[f"glora_{path}_Xd"], params[f"glora_{path}_Xu"]
            return b.view_as(b), a.view_as(a)  # no parameters, whose record would be kept with this weight
        x = params[f"glora_{path}_X"]
        return x * x.new_ones(site.out_features, 1), x.new_ones(1, site.in_features)

    def _bias(self, site: LinearSite, params: Params) -> Float[Tensor, " o"] | None:
        if not any(name.startswith(_OF_BIAS) for name in params):
            return None
        if site.bias is None:
            raise ConfigError(f"GLoRA at {site.name} needs the frozen bias: load the base model before attaching")
        bias = own = site.bias
        if "glora_D_X" in params:
            bias = own + own * params["glora_D_X"] + params["glora_E_X"]
        c = params["glora_C_Xd"] @ params["glora_C_Xu"] if "glora_C_Xd" in params else params.get("glora_C_X")
        if c is not None and site.weight is not None:
            bias = bias + site.weight.matmul(c.T)[0].to(c.dtype)
        return bias
