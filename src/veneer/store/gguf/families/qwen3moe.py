"""Qwen3-MoE: the weights of the chosen experts are always normalised."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import ATTENTION_BIAS, DECODER, EXPERTS, STACKED
from veneer.store.gguf.layout import experts, experts_everywhere

FAMILY = GgufFamily(
    architecture="qwen3moe",
    model_types=("qwen3_moe",),
    fields=(*DECODER, *EXPERTS),
    biases=ATTENTION_BIAS,
    experts=STACKED,
    only={"hidden_act": ("silu",), "norm_topk_prob": (True,), "attention_bias": (False,)},
    refuses=experts_everywhere,
    parts=experts,
)
