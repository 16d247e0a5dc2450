"""GPT-2: learned positions; its matrices are stored as (in, out)."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import LAYER_NORM, SHAPE, Field

FAMILY = GgufFamily(
    architecture="gpt2",
    model_types=("gpt2",),
    fields=(
        *SHAPE,
        Field("feed_forward_length", "n_inner", implied=lambda config: 4 * config.n_embd),
        Field(LAYER_NORM, "layer_norm_epsilon", kind=float),
    ),
    rotary=None,
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    turned=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
)
