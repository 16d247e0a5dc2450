"""Llama 1 to 3, Mistral and SmolLM2: no file names an architecture "mistral"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import Family
from veneer.store.gguf.fields import ATTENTION_BIAS, DECODER, VOCABULARY
from veneer.store.gguf.layout import long_windows, neighbours


def _problems(config: Any) -> Iterator[str]:
    if config.model_type == "mistral":
        yield from long_windows(config)


FAMILY = Family(
    architecture="llama",
    model_types=("llama", "mistral"),
    fields=(VOCABULARY, *DECODER),
    biases={**ATTENTION_BIAS, "ffn_up.bias": "mlp_bias"},
    only={"hidden_act": ("silu",)},
    refuses=_problems,
    scalings=("default", "linear", "yarn", "llama3"),
    rotary_width=True,
    rows=neighbours,
)
