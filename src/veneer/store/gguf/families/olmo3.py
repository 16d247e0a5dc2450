"""OLMo 3: the runtime treats it as an OLMo 2 with windows on three of four layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import FEED_FORWARD, GROUPED, RMS, WINDOW, Field


def _problems(config: Any) -> Iterator[str]:
    full, sliding = (config.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
    if full != sliding:
        yield f"rope_theta {sliding} in layers with windows and {full} in the others: the format holds one value"


FAMILY = GgufFamily(
    architecture="olmo2",
    reads=False,
    marked_by="attention.sliding_window",
    model_types=("olmo3",),
    fields=(
        *GROUPED,
        FEED_FORWARD,
        Field("rope.freq_base", "rope_parameters.full_attention.rope_theta", kind=float),
        Field("rope.freq_base", "rope_parameters.sliding_attention.rope_theta", kind=float),
        RMS,
        WINDOW,
    ),
    rotary="rope_parameters.full_attention",
    sliding_rotary="rope_parameters.sliding_attention",
    windows=True,
    window_step=0,
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    refuses=_problems,
    scalings=("default", "linear", "yarn"),
    head="must",
)
