"""LN tuning: the norms are trained, and nothing else (Zhao et al. 2023, arXiv:2312.11420, section 2)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, cast

from veneer.contract.keys import place_of, tuned_key
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.contract.whole import WholeMethod
from veneer.plain.module_names import matches_any

_BEFORE_AND_AFTER = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")


def _named(*names: str) -> dict[str, tuple[str, ...]]:
    return {"target_modules": names}


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(WholeMethod):
    """Settings of LN tuning, with the names that PEFT gives them.

    ``target_modules`` are trained completely; by default they are the norms.

    Difference from PEFT: beside a 16-bit base the trained copies are float32. With autocast_adapter_dtype=False they
    have the base's dtype, as in PEFT.
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    default_targets: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm", "norm")
    family_targets: ClassVar[FamilyTargets] = {
        **dict.fromkeys(("bloom", "falcon"), _named("input_layernorm", "post_attention_layernorm", "ln_f")),
        **dict.fromkeys(("t5", "mt5"), _named("layer_norm", "final_layer_norm")),
        **dict.fromkeys(("gemma2", "gemma3_text"), _named(*_BEFORE_AND_AFTER, "post_feedforward_layernorm", "norm")),
        **dict.fromkeys(("qwen2", "qwen3"), _named("post_attention_layernorm")),
        "llava": _named(
            "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"
        ),
        "bart": _named("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "gpt2": _named("ln_1", "ln_2", "ln_f"),
        "gptj": _named("ln_1", "ln_f"),
        "phi": _named("input_layernorm", "final_layernorm"),
        "blip-2": _named("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
    }
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("layers_pattern", "layers_to_transform"))

    def written_key(self, key: str) -> str:
        place = place_of(key, ())
        is_target = matches_any(place.path, cast("Collection[str] | str", self.target_modules))
        return tuned_key(place.path, place.end) if is_target else key
