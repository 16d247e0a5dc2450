"""Llama 1 to 3, Mistral and SmolLM2: no file names an architecture "mistral"."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import ATTENTION_BIAS, DECODER, VOCABULARY
from veneer.store.gguf.layout import neighbours

FAMILY = GgufFamily(
    architecture="llama",
    model_types=("llama", "mistral"),
    fields=(VOCABULARY, *DECODER),
    biases={**ATTENTION_BIAS, "ffn_up.bias": "mlp_bias"},
    only={"hidden_act": ("silu",)},
    cut_to_window=True,
    scalings=("default", "linear", "yarn", "llama3"),
    rotary_width=True,
    rows=neighbours,
)
