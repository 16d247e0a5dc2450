"""Granite: a Llama with scaled embeddings, attention, residuals and logits."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, FEED_FORWARD, GROUPED, RMS, VOCABULARY, Field
from veneer.store.gguf.layout import neighbours

FAMILY = GgufFamily(
    architecture="granite",
    reads=False,
    model_types=("granite",),
    fields=(
        VOCABULARY,
        *GROUPED,
        FEED_FORWARD,
        BASE,
        RMS,
        Field("attention.scale", "attention_multiplier", kind=float),
        Field("embedding_scale", "embedding_multiplier", kind=float),
        Field("residual_scale", "residual_multiplier", kind=float),
        Field("logit_scale", "logits_scaling", kind=float),
    ),
    only={"hidden_act": ("silu",), "mlp_bias": (False,), "attention_bias": (False,)},
    rotary_width=True,
    rows=neighbours,
)
