"""Settings of LoRA: its fields in PEFT's names, their problems, and the values that differ by layer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from veneer.contract import LinearMethod
from veneer.contract.patterns import below_one, broken, first_match, values_of
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
        found = super().problems() + self._problems_of_sizes()
        start = find_start(self.init_lora_weights)
        if start is None:
            found.append(f"init_lora_weights={self.init_lora_weights!r} must be one of {', '.join(start_names())}")
        for own, (name, _) in _FROM_DATA.items():
            if getattr(self, name) is not None and self.init_lora_weights != own:
                found.append(f"{name} has no effect with init_lora_weights={self.init_lora_weights!r}: give {own!r}")
        if self.ensure_weight_tying is True:
            found += self._problems_of_ties()
        found += _problems_of_rows(self.trainable_token_indices) + self._problems_of_parameters()
        found += self._problems_of_invocation() + below_one({"qalora_group_size": self.qalora_group_size})
        return found + refusals(self)

    def _problems_of_invocation(self) -> list[str]:
        """An adapter that acts from its tokens on has nothing that acts on whole sequences."""
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return []
        if not tokens or min(tokens) < 0:
            return [f"alora_invocation_tokens={list(tokens)!r} must hold token ids, at least one"]
        of_biases = [] if self.bias == "none" else ["bias"]
        return excluded(self, (*_ON_WHOLE_SEQUENCES, *of_biases), "alora_invocation_tokens: it acts on whole sequences")

    def _problems_of_ties(self) -> list[str]:
        """Tied modules share A and B, one of them transposed: what is made for one side of a weight has no place."""
        start = self.init_lora_weights
        named = start == "eva" or getattr(find_start(start), "taken_off", False)
        return excluded(self, ("use_dora", "lora_bias", *["init_lora_weights"] * named), "ensure_weight_tying")

    def _problems_of_parameters(self) -> list[str]:
        if not self.target_parameters:
            return []
        found = excluded(
            self,
            ("lora_dropout", "lora_bias", "use_dora"),
            "target_parameters, which change a weight where it is read",
        )
        of_data = ("init_lora_weights",) if self.init_lora_weights in _FROM_DATA else ()
        return found + excluded(self, of_data, "target_parameters: it starts from what passes through a layer")

    def _problems_of_sizes(self) -> list[str]:
        alphas = values_of(self, "lora_alpha", "alpha_pattern")
        found = below_one(values_of(self, "r", "rank_pattern"))
        found += [
            f"{name}={alpha!r} must be a finite number other than 0" for name, alpha in alphas.items() if alpha == 0
        ]
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

    @abstractmethod
    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A at this site."""

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
_ON_WHOLE_SEQUENCES = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "modules_to_save", "ensure_weight_tying",
)  # fmt: skip


def _problems_of_rows(given: Collection[int] | Mapping[str, Collection[int]] | None) -> list[str]:
    if given is None:
        return []
    found = []
    for name, rows in (given if isinstance(given, Mapping) else {"": given}).items():
        where = f"trainable_token_indices[{name!r}]" if name else "trainable_token_indices"
        if not rows or min(rows) < 0:
            found.append(f"{where}={rows!r} must hold whole numbers of at least 0, and at least one")
        elif len(set(rows)) < len(rows):
            found.append(
                f"{where} holds {sorted({row for row in rows if list(rows).count(row) > 1})} more than once: once is "
                "enough"
            )
    return found
