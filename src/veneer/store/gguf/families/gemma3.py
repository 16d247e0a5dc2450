"""Gemma 3: a window on five of six layers, which have their own rotary base."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import ATTENTION_BIAS, BASE, CAPS, DECODER, WINDOW, Field

FAMILY = GgufFamily(
    architecture="gemma3",
    model_types=("gemma3_text",),
    fields=(
        *(entry for entry in DECODER if entry is not BASE),
        Field("rope.freq_base", "rope_parameters.full_attention.rope_theta", kind=float),
        Field("rope.freq_base_swa", "rope_parameters.sliding_attention.rope_theta", kind=float),
        *CAPS,
        WINDOW,
    ),
    rotary="rope_parameters.full_attention",
    sliding_rotary="rope_parameters.sliding_attention",
    biases=ATTENTION_BIAS,
    query_width_layers=62,
    windows=True,
    window_step=6,
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    scalings=("default", "linear"),
    plus_one=True,
)
