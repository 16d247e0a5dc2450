"""Falcon 7B, read only: with more key-value heads, q, k and v lie in one matrix in another order."""

from __future__ import annotations

from veneer.store.gguf.family import Family
from veneer.store.gguf.fields import BASE, LAYER_NORM, SHAPE, Field

FAMILY = Family(
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
