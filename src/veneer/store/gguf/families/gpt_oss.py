"""gpt-oss: attention sinks, windows on every other layer, experts with biases whose gate and up alternate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, STACKED, WINDOW, Field
from veneer.store.gguf.layout import alternating_experts


def _problems(config: Any) -> Iterator[str]:
    if any((kind == "sliding_attention") == bool(layer % 2) for layer, kind in enumerate(config.layer_types)):
        yield "layer_types that do not alternate, beginning with a window: the runtime has no other pattern"


FAMILY = GgufFamily(
    architecture="gpt-oss",
    reads=False,
    model_types=("gpt_oss",),
    fields=(
        *DECODER,
        Field("expert_feed_forward_length", "intermediate_size"),
        Field("expert_count", "num_local_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
        WINDOW,
    ),
    experts=STACKED,
    windows=True,
    window_step=2,
    only={"swiglu_limit": (7.0,), "attention_bias": (True,)},
    refuses=_problems,
    scalings=("default", "linear", "yarn"),
    turned=STACKED,
    parts=alternating_experts,
    head="must",
)
