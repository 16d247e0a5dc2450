"""Mixtral: the runtime treats it as a Llama with experts."""

from __future__ import annotations

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, STACKED, VOCABULARY, Field
from veneer.store.gguf.layout import experts, neighbours

FAMILY = GgufFamily(
    architecture="llama",
    reads=False,
    marked_by="expert_count",
    model_types=("mixtral",),
    fields=(
        VOCABULARY,
        *DECODER,
        Field("expert_count", "num_local_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
    ),
    experts=STACKED,
    only={"hidden_act": ("silu",)},
    cut_to_window=True,
    scalings=("default", "linear", "yarn", "llama3"),
    rotary_width=True,
    rows=neighbours,
    parts=experts,
)
