"""StableLM: partial rotary embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import BASE, FEED_FORWARD, GROUPED, LAYER_NORM, Field

if TYPE_CHECKING:
    from torch import Tensor


def _head_norms(name: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield the GGUF name for the norm of one head of q or k, and the conversion of its weight. All heads of a layer
    share this name, because the file stores their norms in one tensor.
    """
    if found := re.search(r"self_attn\.([qk])_layernorm\.norms\.\d+\.weight$", name):
        yield f"attn_{found[1]}_norm.weight", lambda tensor: tensor


FAMILY = GgufFamily(
    architecture="stablelm",
    model_types=("stablelm",),
    fields=(
        *GROUPED,
        FEED_FORWARD,
        BASE,
        Field(LAYER_NORM, "layer_norm_eps", kind=float),
        Field("use_parallel_residual", "use_parallel_residual", kind=bool),
    ),
    partial_rotary=True,
    biases={"attn_q.bias": "use_qkv_bias"},
    only={"hidden_act": ("silu",)},
    scalings=("default",),
    rotary_width=True,
    parts=_head_norms,
    head="must",
)
