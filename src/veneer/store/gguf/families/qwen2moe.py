"""Qwen1.5-MoE and Qwen2-MoE: routed experts and a shared one."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, EXPERTS, STACKED, Field
from veneer.store.gguf.layout import experts, experts_everywhere, shared_gate

FAMILY = GgufFamily(
    architecture="qwen2moe",
    model_types=("qwen2_moe",),
    fields=(*DECODER, *EXPERTS, Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    biases={"attn_q.bias": "qkv_bias"},
    experts=STACKED,
    only={"hidden_act": ("silu",), "norm_topk_prob": (False,)},
    refuses=experts_everywhere,
    rows=shared_gate,
    parts=experts,
)
