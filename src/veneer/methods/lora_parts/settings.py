"""Settings of LoRA: its fields in PEFT's names, their problems, and the values that differ by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from veneer.contract import LinearMethod
from veneer.contract.patterns import below_one, broken, first_match, values_of
from veneer.core.sites import LinearSite
from veneer.inits import Start, find_start, start_names
from veneer.inits.corda import CordaConfig
from veneer.inits.eva import EvaConfig
from veneer.inits.lora_ga import LoraGAConfig
from veneer.methods.lora_parts.blocks import BdLoraConfig
from veneer.methods.lora_parts.kasa import KasaConfig
from veneer.methods.lora_parts.monteclora import MontecloraConfig
from veneer.methods.lora_parts.velora import VeloraConfig


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LinearMethod):
    """Fields of `LoraConfig`, their problems, and the values that differ by layer."""

    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "r",
            "rank_pattern",
            "lora_dropout",
            "kasa_config",
            "bias",
            "init_lora_weights",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "fan_in_fan_out",
            "lora_bias",
            "velora_config",
            "monteclora_config",
        }
        | {"target_parameters", "ensure_weight_tying"}
    )

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
        super().__post_init__()
        for name, kind in (*_FROM_DATA.values(), *_PARTS.items()):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # as files hold it
                object.__setattr__(self, name, kind.from_dict(given))

    def problems(self) -> list[str]:
        found = super().problems() + self._problems_of_sizes()
        start = find_start(self.init_lora_weights)
        if start is None:
            found.append(f"init_lora_weights={self.init_lora_weights!r} must be one of {', '.join(start_names())}")
        for own, (name, _) in _FROM_DATA.items():
            if getattr(self, name) is not None and self.init_lora_weights != own:
                found.append(f"{name} has no effect with init_lora_weights={self.init_lora_weights!r}: give {own!r}")
        if self.lora_bias and self.use_dora:
            found.append("lora_bias and use_dora exclude each other, as in PEFT: drop one of them")
        if self.use_dora and start is not None and start.fixed:
            found.append(
                f"init_lora_weights={self.init_lora_weights!r} and use_dora exclude each other, as in PEFT: leave one "
                "of them out"
            )
        if self.ensure_weight_tying is True:
            found += self._problems_of_ties()
        found += _problems_of_rows(self.trainable_token_indices) + self._problems_of_parameters()
        found += self._problems_of_invocation() + self._problems_of_small_factors()
        return found + self._problems_of_training_passes()

    def _problems_of_small_factors(self) -> list[str]:
        """Factors in blocks, of pooled inputs, or with a diagonal between them are drawn, and no variant but rsLoRA
        goes with them, as in PEFT.
        """
        found = below_one({"qalora_group_size": self.qalora_group_size})
        kinds = {"use_bdlora": self.use_bdlora, "use_qalora": self.use_qalora or None, "kasa_config": self.kasa_config}
        on, *others = [*(name for name, value in kinds.items() if value is not None), ""]
        given = {name: getattr(self, name) for name in (*_NOT_IN_SMALL, *filter(None, others))} if on else {}
        if self.has_kasa and not self.inference_mode:
            given["lora_dropout"] = self.lora_dropout
        if on and self.init_lora_weights not in (True, False):
            given["init_lora_weights"] = self.init_lora_weights
        return found + [
            f"{name}={value!r} does not go with {on}: leave it out" for name, value in given.items() if value
        ]

    def _problems_of_training_passes(self) -> list[str]:
        """Options that change A, or its gradient, in training go with plain factors alone, as in PEFT."""
        on, *others = [*(name for name in _IN_TRAINING if getattr(self, name) is not None), ""]
        whole = {name: getattr(self, name) for name in (*_NOT_IN_SMALL, "use_qalora")}
        parts = {name: getattr(self, name) for name in ("use_bdlora", "kasa_config", *filter(None, others))}
        given = [(name, value) for name, value in whole.items() if value]
        given += [(name, value) for name, value in parts.items() if value is not None]
        found = [f"{name}={value!r} does not go with {on}: leave it out" for name, value in given if on]
        velora = self.velora_config  # a mapping as files hold it, or the settings
        init_type = velora.get("init_type") if isinstance(velora, Mapping) else getattr(velora, "init_type", None)
        if init_type == "batch_average_once" and not self.inference_mode:
            found.append(
                "velora_config.init_type='batch_average_once' keeps the mean of a first batch, which is not supported "
                "in training: give 'batch_average' or 'random'"
            )
        return found

    def _problems_of_invocation(self) -> list[str]:
        """An adapter that acts from its tokens on has nothing that acts on whole sequences."""
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return []
        if not tokens or min(tokens) < 0:
            return [f"alora_invocation_tokens={list(tokens)!r} must hold token ids, at least one"]
        whole = {name: getattr(self, name) for name in _ON_WHOLE_SEQUENCES}
        whole["bias"] = None if self.bias == "none" else self.bias
        return [
            f"{name}={value!r} does not go with alora_invocation_tokens: it acts on whole sequences"
            for name, value in whole.items()
            if value
        ]

    def _problems_of_ties(self) -> list[str]:
        """Tied modules share A and B, one of them transposed: what is made for one side of a weight has no place."""
        start = self.init_lora_weights
        given = {name: getattr(self, name) for name in ("use_dora", "lora_bias")}
        given |= {"init_lora_weights": start if start == "eva" or getattr(find_start(start), "taken_off", False) else 0}
        return [f"{name}={value!r} does not go with ensure_weight_tying" for name, value in given.items() if value]

    def _problems_of_parameters(self) -> list[str]:
        given = self.target_parameters
        if given is None:
            return []
        others = ("lora_dropout", "lora_bias", "use_dora")
        return [
            f"{name}={getattr(self, name)!r} does not go with target_parameters, which change a weight where it is read"
            for name in others
            if given and getattr(self, name)
        ] + (
            [
                f"init_lora_weights={self.init_lora_weights!r} does not go with target_parameters: it starts from what "
                "passes through a layer"
            ]
            if given and self.init_lora_weights in _FROM_DATA
            else []
        )

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
        return max((self.r, *self.rank_pattern.values())) * (2 if self.has_kasa else 1)

    def alpha(self, site: LinearSite) -> float:
        """Return alpha at this site."""
        return first_match(self.alpha_pattern, site.name, self.lora_alpha)

    @property
    def has_kasa(self) -> bool:
        """True if the least singular triplets are taken off the weight."""
        return self.kasa_config is not None

    @property
    def has_small_factors(self) -> bool:
        """True if A or B of a layer is smaller than those of a plain product."""
        return self.use_qalora or self.use_bdlora is not None

    @property
    def pooled(self) -> int:
        """Count of inputs that share a column of A."""
        return self.qalora_group_size if self.use_qalora else 1

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Return the counts of diagonal blocks of A and of B at this site; 1 is a whole matrix."""
        return self.use_bdlora.blocks(site) if isinstance(self.use_bdlora, BdLoraConfig) else (1, 1)

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
        return cast(Start, find_start(self.init_lora_weights))  # problems() has seen to it


_FROM_DATA: Mapping[str, tuple[str, type[EvaConfig | CordaConfig | LoraGAConfig]]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
"""The field and the settings of each start that needs a pass over data."""
_PARTS: Mapping[str, type[BdLoraConfig | KasaConfig | VeloraConfig | MontecloraConfig]] = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
}
_IN_TRAINING = ("velora_config", "monteclora_config")
_NOT_IN_SMALL = ("use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "alora_invocation_tokens")
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
