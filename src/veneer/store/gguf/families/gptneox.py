"""GPT-NeoX and Pythia: q, k and v interleaved by head; partial rotary embedding."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, FEED_FORWARD, LAYER_NORM, SHAPE, Field
from veneer.store.gguf.layout import by_role

FAMILY = GgufFamily(
    architecture="gptneox",
    reads=False,
    model_types=("gpt_neox",),
    fields=(
        *SHAPE,
        FEED_FORWARD,
        BASE,
        Field("use_parallel_residual", "use_parallel_residual", kind=bool),
        Field(LAYER_NORM, "layer_norm_eps", kind=float),
    ),
    partial_rotary=True,
    only={"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "attention_bias": (True,)},
    scalings=("default",),
    rotary_width=True,
    rows=by_role,
    head="must",
)
