"""GGUF keys shared by many families, and the numbers of transformers' configs that they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """Number held by both a file and a config.

    ``key`` follows the architecture's name and a point. ``path`` is an attribute of the config; after a point, a key of
    the dict that it holds. If the file's value is ``off``, the config's is None. ``kind`` is the type in the file.
    ``implied`` is the number that None means in the config.
    """

    key: str
    path: str
    off: float | None = None
    kind: type[int] | type[float] | type[bool] = int
    implied: Callable[[Any], Any] | None = None


SCALING = "rope.scaling."
ORIGINAL_LENGTH = SCALING + "original_context_length"
ROTARY_WIDTH = "rope.dimension_count"
WINDOW_PATTERN = "attention.sliding_window_pattern"
FREQUENCY_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
FACTOR_TENSORS = (FREQUENCY_FACTORS, SHORT_FACTORS, LONG_FACTORS)

LENGTH = Field("context_length", "max_position_embeddings")
SHAPE = (
    Field("block_count", "num_hidden_layers"),
    LENGTH,
    Field("embedding_length", "hidden_size"),
    Field("attention.head_count", "num_attention_heads"),
)
HEADS_KEPT = "attention.head_count_kv"
GROUPED = (*SHAPE, Field(HEADS_KEPT, "num_key_value_heads"))
FEED_FORWARD = Field("feed_forward_length", "intermediate_size")
KEY_WIDTH = Field("attention.key_length", "head_dim")
VALUE_WIDTH = Field("attention.value_length", "head_dim")
BASE = Field("rope.freq_base", "rope_parameters.rope_theta", kind=float)
RMS = Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", kind=float)
DECODER = (*GROUPED, FEED_FORWARD, BASE, RMS, KEY_WIDTH, VALUE_WIDTH)
"""Llama's own, which most families have."""

VOCABULARY = Field("vocab_size", "vocab_size")
EXPERTS = (
    Field("expert_count", "num_experts"),
    Field("expert_used_count", "num_experts_per_tok"),
    Field("expert_feed_forward_length", "moe_intermediate_size"),
)
STACKED = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
WINDOW = Field("attention.sliding_window", "sliding_window", off=0)
CAPS = (
    Field("attn_logit_softcapping", "attn_logit_softcapping", off=0, kind=float),
    Field("final_logit_softcapping", "final_logit_softcapping", off=0, kind=float),
)
LAYER_NORM = "attention.layer_norm_epsilon"
ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}

SILENT = frozenset({"vocab_size", "tensor_data_layout", SCALING + "finetuned"})
"""Keys that say nothing about the computation, or nothing that the tensors' shapes do not say."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "use_parallel_residual": (False,),
}
"""Keys with the values at which they do nothing: what a family has no field for must have one of these."""
