"""Qwen3: q and k are normalised for each head."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import ATTENTION_BIAS, DECODER
from veneer.store.gguf.layout import no_windows

FAMILY = GgufFamily(
    architecture="qwen3",
    model_types=("qwen3",),
    fields=DECODER,
    biases=ATTENTION_BIAS,
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    refuses=no_windows,
)
