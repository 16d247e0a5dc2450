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
from veneer.methods.lora_parts.checks import LoraChecks
from veneer.methods.lora_parts.late_start import LoraLateStart
from veneer.methods.lora_parts.raised import fields_of, parameters_of
from veneer.methods.lora_parts.settings import LoraSettings
from veneer.methods.lora_parts.taken_off import joined, packing_of, turned
from veneer.methods.variants import VARIANTS, variants_of
from veneer.records.channel_groups import block_diagonal, diagonal_blocks
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.stacks import stack, unstack


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

    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A at this site: alpha / r or a variant's form of it, times the repeats of
        the update.
        """
        r = self.rank(site)
        scale = self.alpha(site) / r
        for variant in variants_of(self):
            scale = variant.scaled(scale, r)
        return scale * site.repeats

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
        a, b = (factor.flatten(1) for factor in joined(params))
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
        plain = packing_of(self)
        return replace(plain, fixed=(*plain.fixed, *(name for v in variants_of(self) for name in v.fixed)))

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
            parameters=tuple(self.target_parameters or ()),
            rows=rows,
            keeps_tie=self.ensure_weight_tying,
            turned=turned,
        )

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return tuple(self.alora_invocation_tokens or ())

    @property
    def reads_weight(self) -> bool:
        return any(v.reads_weight for v in variants_of(self))

    @property
    def training(self) -> Training | None:
        return next(filter(None, (v.training() for v in variants_of(self))), None)

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
        fields = fields_of(records)
        if fields is None:
            return None
        config = cls(target_modules=tuple(targets), **fields)
        return Raised(config, functools.partial(parameters_of, with_bias=config.lora_bias))

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def late_start(self) -> LateStart:
        return LoraLateStart(
            config=self,
            a="lora_A",
            b="lora_B",
            taken_off=("lora_A_start", "lora_B_start") if self.start.taken_off else (),
            settings=self.data_start,
            is_product=not (self.reads_weight or self.start.taken_off) and all(v.is_product for v in variants_of(self)),
        )

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
