"""BLOOM, read only."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import LAYER_NORM, LENGTH, SHAPE, Field

FAMILY = GgufFamily(
    architecture="bloom",
    fields=(
        *(entry for entry in SHAPE if entry is not LENGTH),
        Field("context_length", "seq_length"),
        Field(LAYER_NORM, "layer_norm_epsilon", kind=float),
    ),
    rotary=None,
    silent=frozenset({"attention.head_count_kv", "feed_forward_length"}),
)
