"""Part of a model to which a tensor of a checkpoint belongs, by its name alone; torch is not imported."""

from __future__ import annotations

import re
from typing import Literal

TensorPart = Literal["embeddings", "attention", "feed-forward", "norms", "output head", "other"]
_KINDS: tuple[tuple[TensorPart, str], ...] = (
    ("output head", r"(^|\.)(lm_head|embed_out|score|classifier)\."),
    ("embeddings", r"(^|\.)(embed|wte|wpe|word_embeddings|embed_tokens|tok_embeddings)"),
    ("norms", r"(norm|(^|\.)ln_?\w*)\.?\w*\.(weight|bias)$"),
    ("attention", r"attn|attention"),
    ("feed-forward", r"mlp|feed_forward|ffn|experts|fc[12]\."),
)  # the first pattern that is found counts


def part_by_name(name: str) -> TensorPart:
    """Return the part of a model to which a tensor belongs, by patterns of names ("other" if none matches). It serves
    models without a description.
    """
    return next((part for part, pattern in _KINDS if re.search(pattern, name)), "other")
