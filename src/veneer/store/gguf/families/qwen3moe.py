"""Qwen3-MoE: the weights of the chosen experts are always normalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.store.gguf.family import Family
from veneer.store.gguf.fields import ATTENTION_BIAS, DECODER, EXPERTS, STACKED
from veneer.store.gguf.layout import experts, no_windows


def _problems(config: Any) -> Iterator[str]:
    yield from no_windows(config)
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "layers without experts (mlp_only_layers, decoder_sparse_step), which the runtime does not read"


FAMILY = Family(
    architecture="qwen3moe",
    model_types=("qwen3_moe",),
    fields=(*DECODER, *EXPERTS),
    biases=ATTENTION_BIAS,
    experts=STACKED,
    only={"hidden_act": ("silu",), "norm_topk_prob": (True,), "attention_bias": (False,)},
    refuses=_problems,
    parts=experts,
)
