"""Which modules a method adapts when the config names none: PEFT's choices, by the model type of transformers."""

from __future__ import annotations

from collections.abc import Mapping

_QV = ("q_proj", "v_proj")
_BERT = ("query", "value")
_FUSED = ("query_key_value",)

LORA: Mapping[str, tuple[str, ...] | str] = {
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

# For IA3 the second tuple names the feed-forward modules among the first: there the input is scaled.
_QV_DOWN = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
_KV_DOWN = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
_FUSED_4H = (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",))
_BERT_IA3 = (("key", "value", "output.dense"), ("output.dense",))
_C_ATTN = (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))

IA3: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
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


def defaults_for(peft_type: str, model_type: str) -> dict[str, tuple[str, ...] | str]:
    """The fields that a config without ``target_modules`` takes for this model type; empty where there is no choice."""
    if peft_type == "IA3":
        targets, feedforward = IA3.get(model_type, ((), ()))
        return {"target_modules": targets, "feedforward_modules": feedforward} if targets else {}
    return {"target_modules": LORA[model_type]} if model_type in LORA else {}
