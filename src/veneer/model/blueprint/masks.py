"""Masks that transformers makes for a decoder's layers, by the layer types in its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask

FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", "linear_attention"
MAKERS: dict[str, Callable[..., Any]] = {
    name: make for name, make in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items() if callable(make)
}
"""Function that makes the mask of a type of layer. A layer that needs several masks has none here."""


def is_recurrent(layer_type: str) -> bool:
    """Return True if layers of a type keep a recurrent state. Their mask is that of padding alone, (b, t)."""
    return MAKERS.get(layer_type) is create_recurrent_attention_mask


def types_in(config: Any) -> tuple[str, ...]:
    """Return the type of each layer that a config lists; empty if it lists none."""
    found = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
    return tuple(next((types for types in found if types), ()))
