"""SmolLM3: no rotary embedding on every fourth layer, which the runtime applies without a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, VOCABULARY
from veneer.store.gguf.layout import neighbours, no_windows

STEP = 4


def _problems(config: Any) -> Iterator[str]:
    yield from no_windows(config)
    rotates = [bool(value) for value in config.no_rope_layers]
    if rotates != [(layer + 1) % STEP != 0 for layer in range(config.num_hidden_layers)]:
        yield f"no_rope_layers {config.no_rope_layers} has no key: the runtime leaves every fourth layer unrotated"


FAMILY = GgufFamily(
    architecture="smollm3",
    reads=False,
    model_types=("smollm3",),
    fields=(VOCABULARY, *DECODER),
    only={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    refuses=_problems,
    rotary_width=True,
    rows=neighbours,
)
