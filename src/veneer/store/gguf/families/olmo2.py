"""OLMo 2: norms after attention and MLP, and over all of q and k."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, FEED_FORWARD, GROUPED, RMS

FAMILY = GgufFamily(
    architecture="olmo2",
    reads=False,
    model_types=("olmo2",),
    fields=(*GROUPED, FEED_FORWARD, BASE, RMS),
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    scalings=("default", "linear", "yarn"),
    head="must",
)
