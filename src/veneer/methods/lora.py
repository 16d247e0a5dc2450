"""LoRA: ``W + (alpha / r) B A`` with A (r, i) and B (o, r) trained (Hu et al. 2021, arXiv:2106.09685, eq. 3).

This file has its settings, their checks and its record; variants (rsLoRA, DoRA, …) are in `methods.variants`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.extras import Extras, not_rows
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.late_start import LateStart
from veneer.contract.packing import Packing
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.peft_fields import OF_LORA, PeftFields
from veneer.contract.raised import Raised
from veneer.contract.settings import Settings
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Training
from veneer.inits import Start, find_start, start_names
from veneer.inits.corda import CordaConfig
from veneer.inits.eva import EvaConfig
from veneer.inits.lora_ga import LoraGAConfig
from veneer.methods.variants import VARIANTS, excluded, refusals, variants_of
from veneer.methods.variants.blocks import BdLoraConfig
from veneer.methods.variants.kasa import KasaConfig
from veneer.methods.variants.monteclora import MontecloraConfig
from veneer.methods.variants.velora import VeloraConfig
from veneer.records.channel_groups import block_diagonal, diagonal_blocks
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.stacks import stack, unstack

_STARTS = ("lora_A_start", "lora_B_start")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LinearMethod):
    """Settings of LoRA and its variants, with the names that PEFT gives them.

    ``rank_pattern`` and ``alpha_pattern`` override r and alpha if a key (a regex) matches the end of the module path.
    ``bias``: the biases of the base that are trained too: "none", "all", or "lora_only" (those of adapted layers).
    ``init_lora_weights`` names a start in `veneer.inits`, such as True (Kaiming A, zero B), "gaussian" or "pissa".
    False makes both random, so that the start changes the model.
    ``eva_config``, ``corda_config``, ``lora_ga_config``: settings of the starts "eva", "corda" and "lora_ga", once
    `initialize_lora_eva_weights`, `initialize_lora_corda_weights` or `initialize_lora_ga_weights` gives them data; None
    is the defaults.
    ``trainable_token_indices``: rows of the input embeddings (or of tables, by module name) that are trained and
    replace the base's. A head tied to the embeddings uses them too. Only these rows are on disk.
    ``target_parameters``: parameters that no linear layer holds, by the ends of their paths, such as
    "experts.gate_up_proj". They are matrices (o, i), or experts' stacked (E, o, i), each expert with factors of its
    own. "all-experts" stands for all stacks of experts.
    ``ensure_weight_tying`` applies if modules share the input embeddings' weight (a tied head) and one of them is
    adapted or trained whole. Then all of them share one adapter or one copy: ΔW at the embeddings, ΔWᵀ at the head.
    ``use_bdlora``: A or B of the layers that a `BdLoraConfig` names are block-diagonal.
    ``use_qalora``: A reads the means of ``qalora_group_size`` inputs (Xu et al. 2023, arXiv:2309.14717).
    ``kasa_config``: the r smallest singular triplets of the weight are subtracted, and a diagonal lies between A and B.
    ``velora_config``: A has the gradient of compressed inputs. ``monteclora_config``: A has noise in training.
    ``alora_invocation_tokens``: the adapter acts on a sequence from the last occurrence of these token ids on
    (Greenewald et al. 2025, arXiv:2504.12397). Before them the keys and values are the base's.

    ``fan_in_fan_out`` is read for compatibility; a layer that stores Wᵀ is recognised by its type.
    """

    peft_type: ClassVar[str] = "LORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "convolution", "attention"})
    outward: ClassVar[frozenset[str]] = frozenset({"lora_B"}.union(*(kind.outward for kind in VARIANTS)))
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = OF_LORA
    usual_fields: ClassVar[Mapping[str, object]] = {"target_modules": "all-linear"}
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
                found.append(f"{name} has no effect with init_lora_weights={given!r}: set init_lora_weights={own!r}")
        one_sided = given == "eva" or (start is not None and start.taken_off)  # tied modules share A and B, transposed
        if self.ensure_weight_tying and one_sided:
            found += excluded(self, ["init_lora_weights"], "ensure_weight_tying")
        if self.target_parameters and given in _FROM_DATA:
            found += excluded(
                self, ["init_lora_weights"], "target_parameters: it starts from what passes through a layer"
            )
        return found

    def _problems_of_sizes(self) -> list[str]:
        alphas = values_of(self, "lora_alpha", "alpha_pattern")
        found = below_one({**values_of(self, "r", "rank_pattern"), "qalora_group_size": self.qalora_group_size})
        found += [f"{name}={x!r} must be a finite number other than 0" for name, x in alphas.items() if x == 0]
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1)")
        return found + broken({"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern})

    def rank(self, site: LinearSite) -> int:
        """Return the rank r in this layer."""
        return first_match(self.rank_pattern, site.name, self.r)

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values())) * math.prod(v.ranks for v in variants_of(self))

    def alpha(self, site: LinearSite) -> float:
        """Return alpha in this layer."""
        return first_match(self.alpha_pattern, site.name, self.lora_alpha)

    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A: alpha / r or a variant's own scale, times the number of times that the layer adds
        the update.
        """
        r = self.rank(site)
        scale = self.alpha(site) / r
        for variant in variants_of(self):
            scale = variant.scaled(scale, r)
        return scale * site.repeats

    @property
    def token_rows(self) -> dict[str | None, tuple[int, ...]]:
        """The table rows that are trained, by the end of the table's path. The key None means the input embeddings."""
        given = self.trainable_token_indices
        tables = given if isinstance(given, Mapping) else {None: given}
        return {name: tuple(rows) for name, rows in tables.items() if rows is not None}

    @property
    def data_start(self) -> EvaConfig | CordaConfig | LoraGAConfig | None:
        """The settings of the initialization if it needs a pass over data, else None."""
        found = _FROM_DATA.get(str(self.init_lora_weights))
        return None if found is None else getattr(self, found[0]) or found[1]()

    @property
    def start(self) -> Start:
        """The initialization of A and B."""
        return cast(Start, find_start(self.init_lora_weights))  # None alone while problems() looks

    def shapes(self, site: LinearSite) -> Shapes:
        shapes = self._factors(site)
        if self.start.taken_off:
            shapes |= {"lora_A_start": shapes["lora_A"], "lora_B_start": shapes["lora_B"]}
        for variant in variants_of(self):
            shapes |= variant.shapes(self, site, shapes)
        return shapes

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start, read, shapes = self.start, self._read(site), self._factors(site)
        drawn = [start.factors(read, self.rank(site), self.scale(site), generator) for _ in range(site.experts)]
        a, b = drawn[0] if site.experts == 1 else stack(drawn)
        b = diagonal_blocks(b, site.groups)
        params = {"lora_A": a.reshape(shapes["lora_A"]), "lora_B": b.reshape(shapes["lora_B"])}
        if start.taken_off:
            params |= {"lora_A_start": params["lora_A"].clone(), "lora_B_start": params["lora_B"].clone()}
        for variant in variants_of(self):
            params |= variant.init(self, site, params, generator)
        return params

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {name: value for v in variants_of(self) for name, value in v.drawn(self, site, generator).items()}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        for variant in variants_of(self):
            params = variant.of_pass(params)
        a, b = (factor.flatten(1) for factor in _joined(params))
        if site.experts > 1:
            a, b = unstack(a, b, site.experts)
        b = block_diagonal(b, site.groups)
        for variant in variants_of(self):
            a, b = variant.factors(self, site, a, b)
        record = LinearDelta.pair(a, b, self.scale(site))
        for variant in variants_of(self):
            record = variant.lower(self, site, params, record)
        return record

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        return {name: value for v in variants_of(self) for name, value in v.derived(self, site).items()}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
        if site.kind == "embedding":
            names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        for variant in variants_of(self):
            names |= variant.disk_names
        return {name: names.get(name, name) for name in self.shapes(site)}

    @property
    def packing(self) -> Packing:
        """Packing of plain LoRA, which fits the plain base in any library. If the start is subtracted, the rank
        doubles.
        """
        fixed = (*["lora_B"] * self.start.keeps_b, *(name for variant in variants_of(self) for name in variant.fixed))
        plain = {"init_lora_weights": True, **{name: None for name, _ in _FROM_DATA.values()}}
        if not self.start.taken_off:
            return Packing({} if self.data_start is None else plain, fixed)
        grow = math.sqrt(2) if self.use_rslora else 2  # so that the scale stays
        sizes = {
            "r": 2 * self.r,
            "lora_alpha": grow * self.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in self.rank_pattern.items()},
            "alpha_pattern": {key: grow * alpha for key, alpha in self.alpha_pattern.items()},
        }
        return TakenOff(fields=plain | sizes, fixed=(*_STARTS, *fixed))

    @property
    def checks(self) -> Checks:
        return LoraChecks({"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}, self)

    @property
    def extras(self) -> Extras:
        named, keeps_tie = tuple(self.target_parameters or ()), self.ensure_weight_tying
        return replace(super().extras, parameters=named, rows=self.token_rows, keeps_tie=keeps_tie, turned=_turned)

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return tuple(self.alora_invocation_tokens or ())

    @property
    def reads_weight(self) -> bool:
        return any(v.reads_weight for v in variants_of(self))

    @property
    def training(self) -> Training | None:
        return next((v for v in variants_of(self) if v.has_penalty), None)

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        a, b = shapes["lora_A"], shapes["lora_B"]
        inputs = math.prod(a[1:]) * math.prod(v.width(self, site) for v in variants_of(self))
        site = replace(site, in_features=inputs, out_features=b[0])
        return site if len(a) == 2 else replace(site, kind="convolution", window=a[2:], groups=max(1, a[0] // b[1]))

    @classmethod
    def variants(cls) -> Mapping[str, str]:
        plain = [kind for kind in VARIANTS if not issubclass(kind, Settings)]
        return {kind.__module__.rpartition(".")[2]: kind.switch for kind in plain}

    @classmethod
    def raised(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Raised | None:
        """Return a LoRA with these updates: plain factors with scale 1, and a bias on B. If only biases change, the
        factors are zero.

        Return None if an update is more than a low-rank pair and a bias.
        """
        if not all(record.only_adds and not record.changes for record in records.values()):
            return None
        ranks = {path: max(record.rank, 1) for path, record in records.items()}
        commonest = max(set(ranks.values()), key=list(ranks.values()).count)
        special = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != commonest}
        config = cls(
            target_modules=tuple(targets),
            r=commonest,
            lora_alpha=commonest,
            rank_pattern=special,
            alpha_pattern=dict(special),
            lora_bias=any(record.bias is not None for record in records.values()),
        )
        return Raised(config, functools.partial(_raised_at, with_bias=config.lora_bias))

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def late_start(self) -> LateStart:
        return LateStart(
            a="lora_A",
            b="lora_B",
            taken_off=_STARTS if self.start.taken_off else (),
            settings=self.data_start,
            is_product=not (self.reads_weight or self.start.taken_off) and all(v.is_product for v in variants_of(self)),
            rank=self.rank,
            scale=self.scale,
            with_ranks=self._with_ranks,
        )

    def _with_ranks(
        self, sites: Mapping[str, LinearSite], ranks: Mapping[str, int], keep_scale: bool
    ) -> Mapping[str, object]:
        """Return the settings with these ranks (see `LateStart`). If layers are dropped, the remaining ones are named
        by path.
        """
        left = [path for path in sites if ranks[path]]
        patterned = replace(self, rank_pattern={path: ranks[path] for path in left if ranks[path] != self.r})
        alphas = {path: self.alpha(sites[path]) for path in left}
        for path in left:
            if keep_scale and ranks[path] != self.rank(sites[path]):  # whichever power of the rank a variant divides by
                alphas[path] *= self.scale(sites[path]) / patterned.scale(sites[path])
        return {
            "rank_pattern": patterned.rank_pattern,
            "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != self.lora_alpha},
            "target_modules": self.target_modules if len(left) == len(sites) else left,
        }

    def _read(self, site: LinearSite) -> LinearSite:
        """Return the layer's description with the number of inputs that A reads. With QA-LoRA these are fewer than the
        layer's inputs.
        """
        for variant in variants_of(self):
            site = variant.read_site(self, site)
        return site

    def _factors(self, site: LinearSite) -> Shapes:
        """Return the shapes of A and B before variants change them."""
        rows, read, point = self.rank(site) * site.experts, self._read(site), (1,) * len(site.window)
        channels = read.in_features // math.prod(site.window)
        return {
            "lora_A": (rows, channels, *site.window),
            "lora_B": (site.out_features, rows // site.groups, *point),
        }


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
class LoraChecks(PatternChecks):
    """Checks for ranks and settings that do not fit the layers."""

    config: LoraConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return the problems of ranks that do not fit layers. An initialization that is subtracted from the weight is
        a problem in grouped convolutions.
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
        """Return advice if the rank is above both widths of every layer. It may be intended if it is above one width
        only.
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


@dataclass(frozen=True)
class TakenOff(Packing):
    """Packing for a start that is subtracted, ``- B₀ A₀``: the file has these factors as further rows of A and columns
    of B.
    """

    def pack(self, params: Params) -> dict[str, Tensor]:
        a, b = _joined(params)
        rest = {name: value for name, value in params.items() if name not in _STARTS}
        return {**rest, "lora_A": a, "lora_B": b}

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        (a, a_start), (b, b_start) = packed["lora_A"].chunk(2), packed["lora_B"].chunk(2, dim=1)
        return {**packed, "lora_A": a, "lora_B": b, "lora_A_start": a_start, "lora_B_start": -b_start}


def _joined(params: Params) -> tuple[Tensor, Tensor]:
    """Return A and B. If the start is subtracted, return ``[A; A₀]`` and ``[B, -B₀]``, whose product is ``B A - B₀
    A₀``.
    """
    a, b = params["lora_A"], params["lora_B"]
    if "lora_A_start" not in params:
        return a, b
    return torch.cat([a, params["lora_A_start"]]), torch.cat([b, -params["lora_B_start"]], dim=1)


def _turned(params: Params) -> dict[str, Tensor]:
    """Return the parameters of the transposed update: (B A)ᵀ is Aᵀ Bᵀ."""
    return {"lora_A": params["lora_B"].T, "lora_B": params["lora_A"].T}


def _raised_at(site: LinearSite, record: LinearDelta, with_bias: bool) -> dict[str, Tensor]:
    """Return the LoRA parameters whose update equals this record."""
    like = record.tensors[0]
    zeros = like.new_zeros(1, site.in_features), like.new_zeros(site.out_features, 1)
    a, b = record.factors() if record.adds else zeros
    params = {"lora_A": a, "lora_B": b / site.repeats}
    if with_bias:
        zero = torch.zeros_like(b[:, 0])
        params["lora_B_bias"] = zero if record.bias is None else record.bias / site.repeats
    return params
