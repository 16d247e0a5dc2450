"""Nemotron, read only."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import ATTENTION_BIAS, BASE, FEED_FORWARD, GROUPED, KEY_WIDTH, LAYER_NORM, Field

FAMILY = GgufFamily(
    architecture="nemotron",
    fields=(*GROUPED, FEED_FORWARD, KEY_WIDTH, BASE, Field(LAYER_NORM, "norm_eps", kind=float)),
    partial_rotary=True,
    biases={**ATTENTION_BIAS, "ffn_up.bias": "mlp_bias"},
)
