"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER
from veneer.store.gguf.layout import no_windows

FAMILY = GgufFamily(
    architecture="qwen2",
    model_types=("qwen2",),
    fields=DECODER,
    only={"hidden_act": ("silu",)},
    refuses=no_windows,
)
