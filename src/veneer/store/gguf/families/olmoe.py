"""OLMoE: norms of whole queries and keys, and experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import DECODER, EXPERTS, STACKED
from veneer.store.gguf.layout import experts


def _problems(config: Any) -> Iterator[str]:
    if config.num_key_value_heads != config.num_attention_heads:
        yield "fewer heads of keys than of queries: the runtime has norms of one width for both"


FAMILY = GgufFamily(
    architecture="olmoe",
    reads=False,
    model_types=("olmoe",),
    fields=(*DECODER, *EXPERTS[:2]),
    experts=STACKED,
    only={"hidden_act": ("silu",), "norm_topk_prob": (False,), "attention_bias": (False,), "clip_qkv": (None,)},
    refuses=_problems,
    parts=experts,
    head="must",
)
