"""StarCoder2, read only."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, FEED_FORWARD, GROUPED, KEY_WIDTH, LAYER_NORM, Field

FAMILY = GgufFamily(
    architecture="starcoder2",
    fields=(*GROUPED, FEED_FORWARD, KEY_WIDTH, BASE, Field(LAYER_NORM, "norm_epsilon", kind=float)),
    biases={"attn_q.bias": "use_bias"},
)
