"""LoRA: ``W + (alpha / r) B A`` with A (r, i) and B (o, r) trained (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Its variants (rsLoRA, DoRA, …) are functions on its record, see `methods.variants`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.extras import Extras
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.late_start import LateStart
from veneer.contract.packing import Packing
from veneer.contract.peft_fields import OF_LORA, PeftFields
from veneer.contract.targets import Names
from veneer.core.groups import block_diagonal, diagonal_blocks
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.stacks import stack, unstack
from veneer.inits import Start, find_start, start_names
from veneer.inits.eva import EvaConfig
from veneer.methods.lora_parts.checks import LoraChecks
from veneer.methods.lora_parts.patterns import compiles, first_match
from veneer.methods.lora_parts.taken_off import TakenOff, joined
from veneer.methods.variants import all_variants

_VARIANTS = all_variants()  # once, here: torch.compile cannot follow an import in the forward pass


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LinearMethod):
    """LoRA and its variants, in PEFT's fields.

    ``rank_pattern`` and ``alpha_pattern`` override r and alpha where the module path ends with a key (a regular
    expression).
    ``bias``: which biases of the base are trained too: "none", "all", or those of the adapted layers ("lora_only").
    ``init_lora_weights`` names a start in `veneer.inits`: True (Kaiming A, zero B), "gaussian", "pissa", …; False makes
    both random, so that the start changes the model.
    ``eva_config``: how "eva" starts, once `initialize_lora_eva_weights` gives it data; None is the defaults.
    ``trainable_token_indices``: rows of the input embeddings (or of tables, by module name) that are trained, each in
    the place of the base's; a head tied to the embeddings sees them too. They alone are on disk.
    ``target_parameters``: parameters that no linear layer holds, by the ends of their paths, such as
    "experts.gate_up_proj": matrices (o, i), or experts' stacked (E, o, i), each expert with factors of its own.
    ``ensure_weight_tying``: where modules share the input embeddings' weight (a tied head) and one of them is adapted
    or trained whole, all of them share one adapter or one copy: ΔW at the embeddings, ΔWᵀ at the head.
    ``fan_in_fan_out`` is read for compatibility; a layer that stores Wᵀ is recognised by its type.
    """

    peft_type: ClassVar[str] = "LORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "convolution", "attention"})
    outward: ClassVar[frozenset[str]] = frozenset({"lora_B"}.union(*(getattr(v, "OUTWARD", ()) for v in _VARIANTS)))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "rank_pattern", "lora_dropout", "bias", "init_lora_weights", "eva_config", "fan_in_fan_out", "lora_bias"}
        | {"target_parameters", "ensure_weight_tying"}
    )
    peft_fields: ClassVar[PeftFields] = OF_LORA
    usual_fields: ClassVar[Mapping[str, object]] = {"target_modules": "all-linear"}

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | Mapping[str, object] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    target_parameters: Collection[str] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eva_config, Mapping):  # as files hold it
            object.__setattr__(self, "eva_config", EvaConfig.from_dict(self.eva_config))

    def problems(self) -> list[str]:
        found = super().problems() + self._problems_of_sizes()
        if find_start(self.init_lora_weights) is None:
            found.append(f"init_lora_weights={self.init_lora_weights!r} must be one of {', '.join(start_names())}")
        if self.eva_config is not None and self.init_lora_weights != "eva":
            found.append(f"eva_config has no effect with init_lora_weights={self.init_lora_weights!r}: give 'eva'")
        if self.lora_bias and self.use_dora:
            found.append("lora_bias and use_dora exclude each other, as in PEFT: drop one of them")
        if self.ensure_weight_tying is True:
            found += self._problems_of_ties()
        return found + _problems_of_rows(self.trainable_token_indices) + self._problems_of_parameters()

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
            ["init_lora_weights='eva' does not go with target_parameters: EVA starts from what goes into a layer"]
            if given and self.init_lora_weights == "eva"
            else []
        )

    def _problems_of_sizes(self) -> list[str]:
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        alphas = {"lora_alpha": self.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        found = [f"{name}={r!r} must be a whole number of at least 1" for name, r in ranks.items() if r < 1]
        found += [
            f"{name}={alpha!r} must be a finite number other than 0" for name, alpha in alphas.items() if alpha == 0
        ]
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1)")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            found += [] if compiles(pattern) else [f"the pattern {pattern!r} is not a regular expression"]
        return found

    def rank(self, site: LinearSite) -> int:
        """r at this site."""
        return first_match(self.rank_pattern, site.name, self.r)

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values()))

    def alpha(self, site: LinearSite) -> float:
        """alpha at this site."""
        return first_match(self.alpha_pattern, site.name, self.lora_alpha)

    def scale(self, site: LinearSite) -> float:
        """The factor of B A at this site: alpha / r, or a variant's form of it, as often as it is added."""
        r = self.rank(site)
        scale = self.alpha(site) / r
        for variant in self._variants("scale"):
            scale = variant.scale(r, scale)
        return scale * site.repeats

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.rank(site)
        rows = r * site.experts
        channels, point = site.in_features // math.prod(site.window), (1,) * len(site.window)
        b_shape = (site.out_features, rows // site.groups, *point)
        shapes: Shapes = {"lora_A": (rows, channels, *site.window), "lora_B": b_shape}
        if self._taken_off:
            shapes |= {"lora_A_start": shapes["lora_A"], "lora_B_start": shapes["lora_B"]}
        for variant in self._variants("shapes"):
            shapes |= variant.shapes(self, site)
        return shapes

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start = self._start
        drawn = [start.factors(site, self.rank(site), self.scale(site), generator) for _ in range(site.experts)]
        a, b = drawn[0] if site.experts == 1 else stack(drawn)
        shapes = self.shapes(site)
        b = diagonal_blocks(b, site.groups)
        params = {"lora_A": a.reshape(shapes["lora_A"]), "lora_B": b.reshape(shapes["lora_B"])}
        if start.taken_off:
            params |= {"lora_A_start": params["lora_A"].clone(), "lora_B_start": params["lora_B"].clone()}
        for variant in self._variants("init"):
            params |= variant.init(self, site, params)
        return params

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        a, b = (factor.flatten(1) for factor in joined(params))
        if site.experts > 1:
            a, b = unstack(a, b, site.experts)
        b = block_diagonal(b, site.groups)
        record = LinearDelta(a=a, b=b, scale=self.scale(site))
        for variant in self._variants("lower"):
            record = variant.lower(self, site, params, record)
        return record

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
        if site.kind == "embedding":
            names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        for variant in self._variants("DISK_NAMES"):
            names |= variant.DISK_NAMES
        return {name: names.get(name, name) for name in self.shapes(site)}

    @property
    def packing(self) -> Packing:
        """Plain LoRA, of twice the rank for a start that is taken off: it fits the plain base, for anybody."""
        if self.init_lora_weights == "eva":
            return Packing({"init_lora_weights": True, "eva_config": None})
        if not self._taken_off:
            return Packing()
        grow = math.sqrt(2) if self.use_rslora else 2  # so that the scale stays
        return TakenOff(
            fields={
                "init_lora_weights": True,
                "r": 2 * self.r,
                "lora_alpha": grow * self.lora_alpha,
                "rank_pattern": {key: 2 * r for key, r in self.rank_pattern.items()},
                "alpha_pattern": {key: grow * alpha for key, alpha in self.alpha_pattern.items()},
            },
            fixed=("lora_A_start", "lora_B_start"),
        )

    @property
    def checks(self) -> Checks:
        return LoraChecks(self)

    @property
    def extras(self) -> Extras:
        given = self.trainable_token_indices
        rows: dict[str | None, tuple[int, ...]] = {}
        if isinstance(given, Mapping):
            rows |= {name: tuple(indices) for name, indices in given.items()}
        elif given:
            rows[None] = tuple(given)
        return replace(
            super().extras,
            biases="adapted" if self.bias == "lora_only" else self.bias,
            parameters=tuple(self.target_parameters or ()),
            rows=rows,
            keeps_tie=self.ensure_weight_tying,
        )

    @property
    def reads_weight(self) -> bool:
        return bool(self._variants("READS_WEIGHT"))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        a, b = shapes["lora_A"], shapes["lora_B"]
        site = replace(site, in_features=math.prod(a[1:]), out_features=b[0])
        return site if len(a) == 2 else replace(site, kind="convolution", window=a[2:], groups=max(1, a[0] // b[1]))

    def turned(self, params: Params) -> dict[str, Tensor]:
        """(B A)ᵀ is Aᵀ Bᵀ."""
        return {"lora_A": params["lora_B"].T, "lora_B": params["lora_A"].T}

    @classmethod
    def fields_for(cls, model_type: str) -> Mapping[str, Names]:
        return {**super().fields_for(model_type), **LOW_RANK.get(model_type, {})}

    @classmethod
    def variants(cls) -> Mapping[str, str]:
        return {v.__name__.rpartition(".")[2]: v.SWITCH for v in _VARIANTS}

    @classmethod
    def of_records(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Self | None:
        """Plain LoRA with a scale of one; where only biases change, the factors are zero."""
        if any(r.in_scale is not None or r.out_scale is not None for r in records.values()):
            return None
        ranks = {path: max(record.rank, 1) for path, record in records.items()}
        commonest = max(set(ranks.values()), key=list(ranks.values()).count)
        special = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != commonest}
        return cls(
            r=commonest,
            lora_alpha=commonest,
            target_modules=tuple(targets),
            rank_pattern=special,
            alpha_pattern=dict(special),
            lora_bias=any(record.bias is not None for record in records.values()),
        )

    def raised(self, site: LinearSite, record: LinearDelta) -> dict[str, Tensor]:
        like = next(t for t in (record.a, record.bias) if t is not None)
        a = like.new_zeros(1, site.in_features) if record.a is None else record.a
        b = like.new_zeros(site.out_features, 1) if record.b is None else record.b
        params = {"lora_A": a, "lora_B": b * (record.scale / site.repeats)}
        if self.lora_bias:
            zero = torch.zeros_like(b[:, 0])
            params["lora_B_bias"] = zero if record.bias is None else record.bias / site.repeats
        return params

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def late_start(self) -> LateStart:
        return _LateStart(
            config=self,
            a="lora_A",
            b="lora_B",
            settings=(self.eva_config or EvaConfig()) if self.init_lora_weights == "eva" else None,
            is_product=not (self.reads_weight or self._taken_off),
        )

    @property
    def _start(self) -> Start:
        return cast(Start, find_start(self.init_lora_weights))  # problems() has seen to it

    @property
    def _taken_off(self) -> bool:
        return self._start.taken_off

    def _variants(self, what: str) -> list[ModuleType]:
        """The variants that are on and offer this."""
        return [v for v in _VARIANTS if getattr(self, v.SWITCH) and hasattr(v, what)]


def _problems_of_rows(given: Collection[int] | Mapping[str, Collection[int]] | None) -> list[str]:
    if given is None:
        return []
    found = []
    for name, rows in (given if isinstance(given, Mapping) else {"": given}).items():
        where = f"trainable_token_indices[{name!r}]" if name else "trainable_token_indices"
        if not rows or min(rows) < 0:
            found.append(f"{where}={rows!r} must hold whole numbers of at least 0, and at least one")
        elif len(set(rows)) < len(rows):
            found.append(f"{where} holds {sorted({row for row in rows if list(rows).count(row) > 1})} more than once")
    return found


@dataclass(frozen=True, kw_only=True)
class _LateStart(LateStart):
    config: LoraConfig

    def rank(self, site: LinearSite) -> int:
        return self.config.rank(site)

    def scale(self, site: LinearSite) -> float:
        return self.config.scale(site)

    def with_ranks(self, sites: Mapping[str, LinearSite], ranks: Mapping[str, int], keep_scale: bool) -> LoraConfig:
        """The layers that are left by their whole paths, with ranks and alphas of their own."""
        config, left = self.config, [path for path in sites if ranks[path]]
        patterned = replace(config, rank_pattern={path: ranks[path] for path in left if ranks[path] != config.r})
        alphas = {}
        for path in left:
            before = config.alpha(sites[path])
            # what keeps the scale, whichever power of the rank a variant divides by
            grown = config.scale(sites[path]) / patterned.scale(sites[path]) if keep_scale else 1.0
            alphas[path] = before * grown if ranks[path] != config.rank(sites[path]) else before
        targets = config.target_modules if len(left) == len(sites) else left
        pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}
        return replace(patterned, target_modules=targets, alpha_pattern=pattern)
