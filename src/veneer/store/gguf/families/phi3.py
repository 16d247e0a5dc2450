"""Phi-3, Phi-3.5 and Phi-4: q, k and v fused in one matrix, gate and up in another."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, ORIGINAL_LENGTH, WINDOW, Field

FAMILY = GgufFamily(
    architecture="phi3",
    model_types=("phi3",),
    fields=(*DECODER, WINDOW, Field(ORIGINAL_LENGTH, "original_max_position_embeddings")),
    partial_rotary=True,
    only={"hidden_act": ("silu",)},
    scalings=("default", "longrope"),
    cut_to_window=True,
    rotary_width=True,
)
