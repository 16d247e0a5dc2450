"""Settings of LoRA: its fields in PEFT's names, their problems, and checks against the layers that it adapts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from veneer.contract import LinearMethod
from veneer.contract.checks import Checks
from veneer.contract.extras import not_rows
from veneer.contract.patterns import below_one, broken, first_match, unmatched, values_of
from veneer.contract.settings import Settings
from veneer.inits import Start, find_start, start_names
from veneer.inits.corda import CordaConfig
from veneer.inits.eva import EvaConfig
from veneer.inits.lora_ga import LoraGAConfig
from veneer.methods.variants import VARIANTS, excluded, refusals, variants_of
from veneer.methods.variants.blocks import BdLoraConfig
from veneer.methods.variants.kasa import KasaConfig
from veneer.methods.variants.monteclora import MontecloraConfig
from veneer.methods.variants.velora import VeloraConfig
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LinearMethod):
    """Fields of `LoraConfig`, their problems, and the values that differ by layer."""

    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "r", "rank_pattern", "lora_dropout", "bias", "init_lora_weights", "eva_config", "corda_config",
            "lora_ga_config", "fan_in_fan_out", "target_parameters", "ensure_weight_tying",
        }
        | {kind.switch for kind in VARIANTS if kind.inert}
    )  # fmt: skip

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | Mapping[str, object] | None = None
    corda_config: CordaConfig | Mapping[str, object] | None = None
    lora_ga_config: LoraGAConfig | Mapping[str, object] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    target_parameters: Collection[str] | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: Collection[int] | None = None
    use_bdlora: BdLoraConfig | Mapping[str, object] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    kasa_config: KasaConfig | Mapping[str, object] | None = None
    velora_config: VeloraConfig | Mapping[str, object] | None = None
    monteclora_config: MontecloraConfig | Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        for name, kind in (*_FROM_DATA.values(), *_SETTINGS.items()):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # as files hold it
                object.__setattr__(self, name, kind.from_dict(given))
        super().__post_init__()

    def problems(self) -> list[str]:
        found = super().problems() + self._problems_of_sizes() + self._problems_of_start()
        tokens = self.alora_invocation_tokens
        if tokens is not None and (not tokens or min(tokens) < 0):
            found.append(f"alora_invocation_tokens={list(tokens)!r} must hold token ids, at least one")
        for name, (fields, why) in _EXCLUDES.items():
            found += excluded(self, fields, f"{name}{why}") if getattr(self, name) else []
        for table, rows in self.token_rows.items():
            found += not_rows(f"trainable_token_indices{'' if table is None else [table]}", rows)
        return found + refusals(self)

    def _problems_of_start(self) -> list[str]:
        given, start, found = self.init_lora_weights, find_start(self.init_lora_weights), list[str]()
        if start is None:
            found.append(f"init_lora_weights={given!r} must be one of {', '.join(start_names())}")
        for own, (name, _) in _FROM_DATA.items():
            if getattr(self, name) is not None and given != own:
                found.append(f"{name} has no effect with init_lora_weights={given!r}: give {own!r}")
        one_sided = given == "eva" or (start is not None and start.taken_off)  # tied modules share A and B, transposed
        if self.ensure_weight_tying and one_sided:
            found += excluded(self, ["init_lora_weights"], "ensure_weight_tying")
        if self.target_parameters and given in _FROM_DATA:
            why = "target_parameters: it starts from what passes through a layer"
            found += excluded(self, ["init_lora_weights"], why)
        return found

    def _problems_of_sizes(self) -> list[str]:
        alphas = values_of(self, "lora_alpha", "alpha_pattern")
        sizes = {**values_of(self, "r", "rank_pattern"), "qalora_group_size": self.qalora_group_size}
        found = below_one(sizes)
        found += [f"{name}={x!r} must be a finite number other than 0" for name, x in alphas.items() if x == 0]
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1)")
        return found + broken({"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern})

    def rank(self, site: LinearSite) -> int:
        """Return the rank r at this site."""
        return first_match(self.rank_pattern, site.name, self.r)

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values())) * math.prod(v.ranks for v in variants_of(self))

    def alpha(self, site: LinearSite) -> float:
        """Return alpha at this site."""
        return first_match(self.alpha_pattern, site.name, self.lora_alpha)

    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A at this site: alpha / r or a variant's form of it, times the repeats of
        the update.
        """
        r = self.rank(site)
        scale = self.alpha(site) / r
        for variant in variants_of(self):
            scale = variant.scaled(scale, r)
        return scale * site.repeats

    @property
    def token_rows(self) -> dict[str | None, tuple[int, ...]]:
        """Rows of tables that are trained, by the end of the table's path; None is the input embeddings."""
        given = self.trainable_token_indices
        tables = given if isinstance(given, Mapping) else {None: given}
        return {name: tuple(rows) for name, rows in tables.items() if rows is not None}

    @property
    def data_start(self) -> EvaConfig | CordaConfig | LoraGAConfig | None:
        """Settings of the start that needs a pass over data; None if the factors start without."""
        found = _FROM_DATA.get(str(self.init_lora_weights))
        return None if found is None else getattr(self, found[0]) or found[1]()

    @property
    def start(self) -> Start:
        """Initialization of A and B."""
        return cast(Start, find_start(self.init_lora_weights))  # None alone while problems() looks


_FROM_DATA: Mapping[str, tuple[str, type[EvaConfig | CordaConfig | LoraGAConfig]]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
"""The field and the settings of each start that needs a pass over data."""
_SETTINGS = {kind.switch: kind for kind in VARIANTS if issubclass(kind, Settings)}
_EXCLUDES = {
    "ensure_weight_tying": (("use_dora", "lora_bias"), ""),
    "target_parameters": (("lora_dropout", "lora_bias", "use_dora"), ", which change a weight where it is read"),
    "alora_invocation_tokens": (
        ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "modules_to_save",
         "ensure_weight_tying", "bias"),
        ": it acts on whole sequences",
    ),
}  # fmt: skip
"""The fields that do not go with a field, and why."""


@dataclass(frozen=True)
class LoraChecks(Checks):
    """Checks for ranks and settings that do not fit the layers."""

    config: LoraSettings

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        patterns = {"rank_pattern": self.config.rank_pattern, "alpha_pattern": self.config.alpha_pattern}
        return unmatched(patterns, names)

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return the problems of factors that do not fit. B consists of blocks at convolutions in groups, which starts
        from the weight do not give.
        """
        grouped = [site for site in sites if site.groups > 1]
        found = [
            f"r={self.config.rank(site)} at {site.name}, a convolution in {site.groups} groups: a rank that "
            f"{site.groups} divides is needed (rank_pattern sets it for single modules)"
            for site in grouped
            if self.config.rank(site) % site.groups
        ]
        found += [said for v in variants_of(self.config) for said in v.refusals_at(self.config, sites)]
        if grouped and self.config.packing.fixed:
            found.append(
                f"init_lora_weights={self.config.init_lora_weights!r} does not go with {grouped[0].name}, a "
                f"convolution in {grouped[0].groups} groups: leave it out, or list the layer in exclude_modules"
            )
        return found

    def advice(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a sentence if the rank is above both widths of every layer; below that it may be a choice, since
        heads are narrow.
        """
        ranks = [self.config.rank(site) for site in sites]
        if not ranks or min(ranks) <= max(max(site.in_features, site.out_features) for site in sites):
            return []
        largest = max(min(site.in_features, site.out_features) for site in sites)
        return [
            f"rank {min(ranks)} is above both widths of every layer adapted, and their updates have rank {largest} at "
            f"most: r={largest} reaches as many (a small one, such as 16, is usual)"
        ]

    def tied(self, tied: Sequence[LinearSite]) -> list[str]:
        values = {site.name: (self.config.rank(site), self.config.alpha(site)) for site in tied}
        if len(set(values.values())) <= 1:
            return []
        told = ", ".join(f"{name} r={r} and alpha={alpha}" for name, (r, alpha) in values.items())
        return [f"ensure_weight_tying=True, but rank_pattern and alpha_pattern give {told}: name all of them alike"]
