"""IA3: vectors rescale keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

A vector l multiplies the output of a layer (bias included), or, for ``feedforward_modules``, its input; of a
convolution, the channels. It starts at one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import matches_any
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.errors import CompositionError

# PEFT's choices by the model type of transformers; the second tuple names the feed-forward modules among the first.
_QV_DOWN = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
_KV_DOWN = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
_FUSED_4H = (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",))
_BERT_IA3 = (("key", "value", "output.dense"), ("output.dense",))
_C_ATTN = (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))

_FAMILIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral"), _KV_DOWN),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV_DOWN),
    **dict.fromkeys(("gpt_neox", "RefinedWeb", "RefinedWebModel", "falcon"), _FUSED_4H),
    **dict.fromkeys(("bert", "roberta"), _BERT_IA3),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _C_ATTN),
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
}


@dataclass(frozen=True, kw_only=True)
class IA3Config(LinearMethod):
    """IA3 in PEFT's fields. ``feedforward_modules`` must be among ``target_modules``: those scale their input.

    Left out, they are the layers that project back from the feed-forward width, by the names that families give them.
    """

    peft_type: ClassVar[str] = "IA3"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    usual_learning_rate: ClassVar[float] = 5e-3
    default_feedforward: ClassVar[tuple[str, ...]] = (
        "down_proj", "fc2", "output.dense", "wo", "dense_4h_to_h", "mlp.c_proj", "w2",
    )  # fmt: skip
    default_targets: ClassVar[tuple[str, ...]] = ("k", "v", *default_feedforward)

    inert: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_ia3_weights"})
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("layers_pattern", "layers_to_transform"))

    feedforward_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        if isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple):
            stray = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if stray:
                found.append(
                    f"feedforward_modules {stray} are not among target_modules {list(self.target_modules)}: "
                    "add them there"
                )
        return found

    @classmethod
    def fields_for(cls, model_type: str) -> Mapping[str, object]:
        if model_type not in _FAMILIES:
            return {}
        targets, feedforward = _FAMILIES[model_type]
        return {"target_modules": targets, "feedforward_modules": feedforward}

    @property
    def checks(self) -> Checks:
        return _Checks(self.feedforward_modules or ())

    def for_sites(self, sites: Sequence[LinearSite]) -> Self:
        """Chosen layers become whole paths, which PEFT, whose IA3 cannot choose layers, reads the same."""
        if self.layers_to_transform is None:
            return self
        return replace(
            self,
            target_modules=tuple(site.name for site in sites),
            feedforward_modules=tuple(site.name for site in sites if self._scales_input(site)),
            layers_to_transform=None,
            layers_pattern=None,
        )

    def shapes(self, site: LinearSite) -> Shapes:
        scales_input = self._scales_input(site)
        if site.kind == "convolution":
            channels = site.in_features // math.prod(site.window) if scales_input else site.out_features
            return {"ia3_l": (1, channels, *[1] * len(site.window))}
        return {"ia3_l": (1, site.in_features) if scales_input else (site.out_features, 1)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        (shape,) = self.shapes(site).values()
        return {"ia3_l": torch.ones(shape) if self.init_ia3_weights else torch.randn(shape, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        vector = params["ia3_l"].flatten()
        if self._scales_input(site):
            return LinearDelta(in_scale=vector.repeat_interleave(math.prod(site.window)))
        return LinearDelta(out_scale=vector, bias=None if site.bias is None else site.bias * vector)

    @classmethod
    def of_records(cls, records: Mapping[str, LinearDelta], targets: Sequence[str]) -> Self | None:
        if not all(r.a is None and (r.in_scale is None) != (r.out_scale is None) for r in records.values()):
            return None
        inputs = tuple(path for path, record in records.items() if record.in_scale is not None)
        return cls(target_modules=tuple(records), feedforward_modules=inputs)

    def raised(self, site: LinearSite, record: LinearDelta) -> dict[str, Tensor]:
        if record.in_scale is not None:  # a channel has one scale for all places of the window
            return {"ia3_l": record.in_scale[None, :: math.prod(site.window)]}
        if record.out_scale is None:
            raise CompositionError(f"the record at {site.name} scales nothing, which IA3 cannot be")
        return {"ia3_l": record.out_scale[:, None]}

    def _scales_input(self, site: LinearSite) -> bool:
        patterns = self.default_feedforward if self.feedforward_modules is None else self.feedforward_modules
        return matches_any(site.name, patterns)


@dataclass(frozen=True)
class _Checks(Checks):
    """``feedforward_modules`` that are none of the modules adapted."""

    feedforward: Collection[str] | str

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        given = self.feedforward
        patterns = [(given, given)] if isinstance(given, str) else [(pattern, (pattern,)) for pattern in given]
        return [
            f"feedforward_modules {shown!r} matches none of the {len(names)} modules adapted, such as {names[0]!r}"
            for shown, pattern in patterns
            if pattern and not any(matches_any(name, pattern) for name in names)
        ]
