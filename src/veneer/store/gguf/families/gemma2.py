"""Gemma 2: caps, and a window on every other layer."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import (
    ATTENTION_BIAS,
    BASE,
    CAPS,
    FEED_FORWARD,
    GROUPED,
    KEY_WIDTH,
    RMS,
    VALUE_WIDTH,
    WINDOW,
)

FAMILY = GgufFamily(
    architecture="gemma2",
    model_types=("gemma2",),
    fields=(*GROUPED, FEED_FORWARD, BASE, RMS, KEY_WIDTH, VALUE_WIDTH, *CAPS, WINDOW),
    biases=ATTENTION_BIAS,
    query_width_layers=46,
    windows=True,
    window_step=2,
    only={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)},
    scalings=("default",),
    plus_one=True,
    head="never",
)
