"""Default targets of PEFT by transformers' model type, for the types whose targets no role expresses.

PEFT lists names for each type. Most of them are those of q and v (for IA3, of k, v and down). A model's description has
these, or its names for roles in models without one. This file holds PEFT's other choices:

- other roles;
- names without a role: ``in_proj`` of DeBERTa, ``receptance`` of RWKV, one of the two inner layers of mT5;
- names that match fewer layers than the role, as in BLIP-2 without its Q-Former;
- the same in Gemma 4 and Llama 4 without their vision, and in Nemotron-H without the ``out_proj`` of Mamba;
- names that attention and feed-forward parts have in common: ``c_proj`` of BTLM, ``key`` and ``value`` of RWKV.
"""

from __future__ import annotations

from veneer.contract.targets import FamilyTargets

_Q_V_DOWN = {"target_modules": ("q", "v", "down")}

LOW_RANK: FamilyTargets = {
    "phi": {"target_modules": ("q", "v", "up", "down")},
    "blip-2": {"target_modules": r".*\.(q|v|q_proj|v_proj)"},
    "deberta": {"target_modules": ("in_proj",)},
    "btlm": {"target_modules": ("c_proj", "c_attn")},
    "gemma4": {"target_modules": r".*language_model\..*\.(q_proj|v_proj)"},
    "nemotron_h": {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "rwkv": {"target_modules": ("key", "value", "receptance", "output")},
}
SCALING: FamilyTargets = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _Q_V_DOWN),
    **dict.fromkeys(("bart", "phi", "gptj", "gpt_neo"), _Q_V_DOWN),
    "opt": {"target_modules": ("q", "k", "down")},
    "mt5": {"target_modules": ("k", "v", "wi_1"), "feedforward_modules": ()},
    "deberta": {"target_modules": ("in_proj", "down")},
    "llama4": {"target_modules": ("q_proj", "v_proj", "down_proj"), "feedforward_modules": ("down_proj",)},
}
