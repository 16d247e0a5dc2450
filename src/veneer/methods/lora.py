"""LoRA: ``W + (alpha / r) B A`` with A (r, i) and B (o, r) trained (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Its variants (rsLoRA, DoRA, …) are functions on its record, see `methods.variants`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.extras import Extras
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.late_start import LateStart
from veneer.contract.packing import Packing
from veneer.contract.peft_fields import OF_LORA, PeftFields
from veneer.contract.raised import Raised
from veneer.contract.settings import Settings
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Training
from veneer.methods.lora_parts.settings import LoraChecks, LoraSettings
from veneer.methods.variants import VARIANTS, variants_of
from veneer.records.channel_groups import block_diagonal, diagonal_blocks
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.stacks import stack, unstack

_STARTS = ("lora_A_start", "lora_B_start")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LoraSettings):
    """LoRA and its variants, in PEFT's fields.

    ``rank_pattern`` and ``alpha_pattern`` override r and alpha if the module path ends with a key (a regular
    expression).
    ``bias`` chooses the biases of the base that are also trained: "none", "all", or those of the adapted layers
    ("lora_only").
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
    ``kasa_config``: the r least singular triplets of the weight are taken off, and a diagonal stands between A and B.
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
        """Plain LoRA, which fits the plain base in any library. A start that is subtracted doubles the rank."""
        fixed = (*self.start.fixed, *(name for variant in variants_of(self) for name in variant.fixed))
        if self.data_start is None and not self.start.taken_off:
            return Packing(fixed=fixed)
        plain = {"init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None}
        if not self.start.taken_off:
            return Packing(plain, fixed)
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
        return LoraChecks(self)

    @property
    def extras(self) -> Extras:
        return replace(
            super().extras,
            parameters=tuple(self.target_parameters or ()),
            rows=self.token_rows,
            keeps_tie=self.ensure_weight_tying,
            turned=_turned,
        )

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
        """Return plain factors with a scale of 1, and a bias on B. They are zero if only biases change."""
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
        """See `LateStart`. Layers are named by their whole paths if some are dropped."""
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
        """The site as A reads it."""
        for variant in variants_of(self):
            site = variant.read_site(self, site)
        return site

    def _factors(self, site: LinearSite) -> Shapes:
        """Shapes of A and B, before variants change them."""
        rows, read, point = self.rank(site) * site.experts, self._read(site), (1,) * len(site.window)
        channels = read.in_features // math.prod(site.window)
        return {
            "lora_A": (rows, channels, *site.window),
            "lora_B": (site.out_features, rows // site.groups, *point),
        }


@dataclass(frozen=True)
class TakenOff(Packing):
    """Packing of a subtracted start, ``- B₀ A₀``, as more rows of A and columns of B."""

    def pack(self, params: Params) -> dict[str, Tensor]:
        a, b = _joined(params)
        rest = {name: value for name, value in params.items() if name not in _STARTS}
        return {**rest, "lora_A": a, "lora_B": b}

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        (a, a_start), (b, b_start) = packed["lora_A"].chunk(2), packed["lora_B"].chunk(2, dim=1)
        return {**packed, "lora_A": a, "lora_B": b, "lora_A_start": a_start, "lora_B_start": -b_start}


def _joined(params: Params) -> tuple[Tensor, Tensor]:
    """A and B. If the start is subtracted they are ``[A; A₀]`` and ``[B, -B₀]``, with product ``B A - B₀ A₀``."""
    a, b = params["lora_A"], params["lora_B"]
    if "lora_A_start" not in params:
        return a, b
    return torch.cat([a, params["lora_A_start"]]), torch.cat([b, -params["lora_B_start"]], dim=1)


def _turned(params: Params) -> dict[str, Tensor]:
    """The parameters of the transposed update: (B A)ᵀ is Aᵀ Bᵀ."""
    return {"lora_A": params["lora_B"].T, "lora_B": params["lora_A"].T}


def _raised_at(site: LinearSite, record: LinearDelta, with_bias: bool) -> dict[str, Tensor]:
    """The parameters that lower to a record."""
    like = record.tensors[0]
    zeros = like.new_zeros(1, site.in_features), like.new_zeros(site.out_features, 1)
    a, b = record.factors() if record.adds else zeros
    params = {"lora_A": a, "lora_B": b / site.repeats}
    if with_bias:
        zero = torch.zeros_like(b[:, 0])
        params["lora_B_bias"] = zero if record.bias is None else record.bias / site.repeats
    return params
