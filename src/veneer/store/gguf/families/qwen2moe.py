"""Qwen1.5-MoE and Qwen2-MoE: routed experts and a shared one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import Family
from veneer.store.gguf.fields import DECODER, EXPERTS, STACKED, Field
from veneer.store.gguf.layout import experts, no_windows, shared_gate


def _problems(config: Any) -> Iterator[str]:
    yield from no_windows(config)
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "layers without experts (mlp_only_layers, decoder_sparse_step), which the runtime does not read"


FAMILY = Family(
    architecture="qwen2moe",
    model_types=("qwen2_moe",),
    fields=(*DECODER, *EXPERTS, Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    biases={"attn_q.bias": "qkv_bias"},
    experts=STACKED,
    only={"hidden_act": ("silu",), "norm_topk_prob": (False,)},
    refuses=_problems,
    rows=shared_gate,
    parts=experts,
)
