"""PEFT's choice of modules for LoRA and its kin where a config names none, by the model type of transformers."""

from __future__ import annotations

from collections.abc import Mapping

_QV = ("q_proj", "v_proj")
_BERT = ("query", "value")
_FUSED = ("query_key_value",)

QUERY_AND_VALUE: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2"), _QV
    ),
    **dict.fromkeys(("gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWeb", "RefinedWebModel", "falcon"), _FUSED),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
}


def query_and_value(model_type: str) -> Mapping[str, object]:
    """The fields that PEFT fills in on a model of this type; none where it has no choice."""
    return {"target_modules": QUERY_AND_VALUE[model_type]} if model_type in QUERY_AND_VALUE else {}
