"""Ministral 3: queries are scaled with the logarithm of their position, and YaRN does not scale attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, SCALING, VOCABULARY, Field
from veneer.store.gguf.layout import neighbours


def _problems(config: Any) -> Iterator[str]:
    mscale = config.rope_parameters.get("mscale")
    if mscale not in (None, 1.0):
        yield f"YaRN's mscale {mscale} has no key: the runtime computes 1.0"


FAMILY = GgufFamily(
    architecture="mistral3",
    reads=False,
    model_types=("ministral3",),
    fields=(
        VOCABULARY,
        *DECODER,
        Field(SCALING + "yarn_log_multiplier", "rope_parameters.mscale_all_dim", kind=float),
        Field("attention.temperature_scale", "rope_parameters.llama_4_scaling_beta", kind=float),
    ),
    only={"hidden_act": ("silu",)},
    cut_to_window=True,
    refuses=_problems,
    scalings=("yarn",),
    rotary_width=True,
    rows=neighbours,
)
