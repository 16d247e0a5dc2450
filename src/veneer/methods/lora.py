"""LoRA: ``W + (alpha / r) B A`` with A (r, i) and B (o, r) trained (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Its variants (rsLoRA, DoRA, …) are functions on its record, see `methods.variants`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
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
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Training
from veneer.core.groups import block_diagonal, diagonal_blocks
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.stacks import stack, unstack
from veneer.core.terms.pair import Pair
from veneer.methods.lora_parts import kasa, monteclora, velora
from veneer.methods.lora_parts.blocks import drawn_blocks
from veneer.methods.lora_parts.checks import LoraChecks
from veneer.methods.lora_parts.kasa import KasaConfig, KasaTraining
from veneer.methods.lora_parts.late_start import LoraLateStart
from veneer.methods.lora_parts.monteclora import MontecloraConfig, MontecloraTraining
from veneer.methods.lora_parts.raised import fields_of, parameters_of
from veneer.methods.lora_parts.settings import LoraSettings
from veneer.methods.lora_parts.taken_off import joined, packing_of, turned
from veneer.methods.lora_parts.velora import VeloraConfig
from veneer.methods.variants import all_variants

_VARIANTS = all_variants()  # once, here: torch.compile cannot follow an import in the forward pass


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
    own.
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
    outward: ClassVar[frozenset[str]] = frozenset({"lora_B"}.union(*(getattr(v, "OUTWARD", ()) for v in _VARIANTS)))
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = OF_LORA
    usual_fields: ClassVar[Mapping[str, object]] = {"target_modules": "all-linear"}

    def scale(self, site: LinearSite) -> float:
        """Return the factor of B A at this site: alpha / r or a variant's form of it, times the repeats of
        the update.
        """
        r = self.rank(site)
        scale = self.alpha(site) / r
        for variant in self._variants("scale"):
            scale = variant.scale(r, scale)
        return scale * site.repeats

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.rank(site)
        rows = r * site.experts
        n_a, n_b = self.blocks(site)
        channels, point = site.in_features // math.prod(site.window), (1,) * len(site.window)
        channels, b_shape = channels // n_a // self.pooled, (site.out_features, rows // site.groups // n_b, *point)
        shapes: Shapes = {"lora_A": (rows, channels, *site.window), "lora_B": b_shape}
        if self.start.taken_off:
            shapes |= {"lora_A_start": shapes["lora_A"], "lora_B_start": shapes["lora_B"]}
        if self.has_kasa:
            shapes[kasa.DIAGONAL] = (r,)
        if isinstance(self.velora_config, VeloraConfig):
            shapes[velora.EMBED] = (self.velora_config.width(site),)
        if isinstance(self.monteclora_config, MontecloraConfig):
            shapes |= self.monteclora_config.shapes(r)
        for variant in self._variants("shapes"):
            shapes |= variant.shapes(self, site)
        return shapes

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start, (n_a, n_b) = self.start, self.blocks(site)
        read = replace(site, in_features=site.in_features // self.pooled)
        drawn = [start.factors(read, self.rank(site), self.scale(site), generator) for _ in range(site.experts)]
        a, b = drawn[0] if site.experts == 1 else stack(drawn)
        shapes = self.shapes(site)
        a = drawn_blocks(shapes["lora_A"], generator) if n_a > 1 else a
        b = diagonal_blocks(b, site.groups * n_b)
        params = {"lora_A": a.reshape(shapes["lora_A"]), "lora_B": b.reshape(shapes["lora_B"])}
        if start.taken_off:
            params |= {"lora_A_start": params["lora_A"].clone(), "lora_B_start": params["lora_B"].clone()}
        if self.has_kasa:
            params[kasa.DIAGONAL] = torch.randn(self.rank(site), generator=generator)
        if isinstance(self.velora_config, VeloraConfig):
            params[velora.EMBED] = self.velora_config.init(site, generator)
        if isinstance(self.monteclora_config, MontecloraConfig):
            params |= self.monteclora_config.init(self.rank(site), generator)
        for variant in self._variants("init"):
            params |= variant.init(self, site, params)
        return params

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if isinstance(self.monteclora_config, MontecloraConfig):
            return self.monteclora_config.drawn(site, self.rank(site), generator)
        return {velora.IN_TRAINING: torch.ones(())} if self.velora_config is not None else {}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        if isinstance(self.monteclora_config, MontecloraConfig):
            params = self.monteclora_config.perturbed(params)
        a, b = (factor.flatten(1) for factor in joined(params))
        if site.experts > 1:
            a, b = unstack(a, b, site.experts)
        n_a, n_b = self.blocks(site)
        a, b = block_diagonal(a, n_a), block_diagonal(b, site.groups * n_b)
        if self.use_qalora:  # PEFT's scale of a mean of inputs
            a = a.repeat_interleave(self.pooled, dim=1) * (site.in_features / self.pooled**2)
        if self.has_kasa:
            return kasa.taken_off(site, params, Pair(a=a, b=b, scale=self.scale(site)))
        if isinstance(self.velora_config, VeloraConfig) and velora.IN_TRAINING in params:
            pair = Pair(a=a, b=b, scale=self.scale(site))
            return LinearDelta(adds=(self.velora_config.compressed(pair, params[velora.EMBED]),))
        record = LinearDelta.pair(a, b, self.scale(site))
        for variant in self._variants("lower"):
            record = variant.lower(self, site, params, record)
        return record

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        return kasa.least_parts(site, self.rank(site)) if self.has_kasa else {}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", **monteclora.DISK_NAMES}
        if site.kind == "embedding":
            names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        for variant in self._variants("DISK_NAMES"):
            names |= variant.DISK_NAMES
        return {name: names.get(name, name) for name in self.shapes(site)}

    @property
    def packing(self) -> Packing:
        plain, held = packing_of(self), () if self.monteclora_config is None else monteclora.HELD
        return replace(plain, fixed=(*plain.fixed, *held, *([] if self.velora_config is None else [velora.EMBED])))

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
        return self.has_kasa or bool(self._variants("READS_WEIGHT"))

    @property
    def training(self) -> Training | None:
        if isinstance(self.monteclora_config, MontecloraConfig):
            return MontecloraTraining(self.monteclora_config)
        return KasaTraining(self.kasa_config) if isinstance(self.kasa_config, KasaConfig) else None

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        a, b = shapes["lora_A"], shapes["lora_B"]
        inputs = math.prod(a[1:]) * self.blocks(site)[0] * self.pooled
        site = replace(site, in_features=inputs, out_features=b[0])
        return site if len(a) == 2 else replace(site, kind="convolution", window=a[2:], groups=max(1, a[0] // b[1]))

    @classmethod
    def variants(cls) -> Mapping[str, str]:
        return {v.__name__.rpartition(".")[2]: v.SWITCH for v in _VARIANTS}

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
            is_product=not (self.reads_weight or self.start.taken_off or self.has_small_factors),
        )

    def _variants(self, what: str) -> list[ModuleType]:
        """The variants that are on and offer this."""
        return [v for v in _VARIANTS if getattr(self, v.SWITCH) and hasattr(v, what)]
