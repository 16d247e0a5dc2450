"""Falcon: q, k and v of one group of heads after the other, both halves beside each other, norms of its own."""

from typing import Any

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import COMMON, Names, NormNames


def _strange(config: Any) -> str | None:
    if config.alibi:
        return "its mask holds a bias that falls with distance (alibi)"
    if config.attention_dropout and not config.parallel_attn:
        return "its blocks drop what attention adds (attention_dropout)"
    return None


FAMILY = Family(
    model_types=("falcon",),
    names=Names(
        joined=(("query_key_value", "by group"),),
        norms=(NormNames(attention="ln_attn", feed_forward="ln_mlp"), *COMMON.norms),
    ),
    strange=_strange,
)
