"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from veneer.store.gguf.family import Family
from veneer.store.gguf.fields import DECODER, ORIGINAL_LENGTH, WINDOW, Field
from veneer.store.gguf.layout import long_windows

FAMILY = Family(
    architecture="phi3",
    model_types=("phi3",),
    fields=(*DECODER, WINDOW, Field(ORIGINAL_LENGTH, "original_max_position_embeddings")),
    partial_rotary=True,
    only={"hidden_act": ("silu",)},
    scalings=("default", "longrope"),
    refuses=long_windows,
    rotary_width=True,
)
