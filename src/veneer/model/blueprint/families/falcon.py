"""Falcon: q, k and v of one group of heads after the other, both halves beside each other, norms of its own.

Older ones (falcon-rw) have a bias by position in rotation's place.
"""

from typing import Any

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import COMMON, Names, NormNames


def _strange(config: Any) -> str | None:
    if config.attention_dropout and not config.parallel_attn:
        return "its blocks apply dropout to the output of attention (attention_dropout)"
    return None


FAMILY = Family(
    model_types=("falcon",),
    names=Names(
        joined=(("query_key_value", "by group"),),
        norms=(NormNames(attention="ln_attn", feed_forward="ln_mlp"), *COMMON.norms),
    ),
    alibi=lambda config: bool(config.alibi),
    rounds_alibi=True,
    strange=_strange,
)
