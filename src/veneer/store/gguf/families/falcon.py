"""Falcon 7B, read only: models with more key-value heads order the fused q, k and v differently."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, LAYER_NORM, SHAPE, Field

FAMILY = GgufFamily(
    architecture="falcon",
    fields=(
        *SHAPE,
        Field("feed_forward_length", "ffn_hidden_size"),
        BASE,
        Field(LAYER_NORM, "layer_norm_epsilon", kind=float),
    ),
    biases={"attn_qkv.bias": "bias"},
    fixed={"attention.head_count_kv": 1},
)
