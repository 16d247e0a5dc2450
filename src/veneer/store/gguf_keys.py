"""GGUF keys and the numbers of transformers' configs that they stand for: one table, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """A number that both a file and a config hold.

    ``key`` follows the architecture's name and a point. ``path`` is an attribute of the config; behind a point, a key
    of the dict that it holds. The file's value ``off`` is None in the config.
    """

    key: str
    path: str
    off: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The keys in which the files of one architecture (``general.architecture``) say what the config of the model says.

    ``rotary`` is the path of the dict that ``rope.scaling`` fills, None where positions do not rotate;
    ``partial_rotary``: ``rope.dimension_count`` may be less than a head. ``biases`` are the config's switches by the
    tensor of a layer that tells them. ``fixed`` are values without which the family's tensors have another layout.
    ``query_width_layers`` is the number of layers of the one model whose queries are scaled by the root of
    hidden_size / heads, for which there is no key; all others are scaled by that of head_dim. ``windows``: sliding
    windows on some layers. ``experts``: tensors that hold the experts of a layer, one behind the other. ``silent``:
    keys that tell nothing which the shapes of the tensors do not.
    """

    fields: tuple[Field, ...]
    rotary: str | None = "rope_parameters"
    partial_rotary: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    query_width_layers: int | None = None
    windows: bool = False
    experts: tuple[str, ...] = ()
    silent: frozenset[str] = frozenset()


SCALING = "rope.scaling."
ORIGINAL_LENGTH = SCALING + "original_context_length"
ROTARY_WIDTH = "rope.dimension_count"
WINDOW_PATTERN = "attention.sliding_window_pattern"
FREQUENCY_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
FACTOR_TENSORS = (FREQUENCY_FACTORS, SHORT_FACTORS, LONG_FACTORS)

_SHAPE = (
    Field("context_length", "max_position_embeddings"),
    Field("embedding_length", "hidden_size"),
    Field("block_count", "num_hidden_layers"),
    Field("attention.head_count", "num_attention_heads"),
)
_GROUPED = (*_SHAPE, Field("attention.head_count_kv", "num_key_value_heads"))
_WIDTH = Field("feed_forward_length", "intermediate_size")
_HEAD = Field("attention.key_length", "head_dim")
_BASE = Field("rope.freq_base", "rope_parameters.rope_theta")
_LLAMA = (*_GROUPED, _WIDTH, _HEAD, _BASE, Field("attention.layer_norm_rms_epsilon", "rms_norm_eps"))
_EXPERTS = (
    Field("expert_count", "num_experts"),
    Field("expert_used_count", "num_experts_per_tok"),
    Field("expert_feed_forward_length", "moe_intermediate_size"),
)
_STACKED = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
_WINDOW = Field("attention.sliding_window", "sliding_window", off=0)
_CAPS = (
    Field("attn_logit_softcapping", "attn_logit_softcapping", off=0),
    Field("final_logit_softcapping", "final_logit_softcapping", off=0),
)
_LAYER_NORM = "attention.layer_norm_epsilon"
_ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}

FAMILIES: Mapping[str, Family] = {
    # Llama, Mistral, SmolLM2: no file names an architecture "mistral".
    "llama": Family(fields=_LLAMA, biases={**_ATTENTION_BIAS, "ffn_up.bias": "mlp_bias"}),
    "qwen2": Family(fields=_LLAMA),
    "qwen3": Family(fields=_LLAMA, biases=_ATTENTION_BIAS),
    "qwen2moe": Family(
        fields=(
            *_LLAMA,
            *_EXPERTS,
            Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        biases={"attn_q.bias": "qkv_bias"},
        experts=_STACKED,
    ),
    "qwen3moe": Family(fields=(*_LLAMA, *_EXPERTS), biases=_ATTENTION_BIAS, experts=_STACKED),
    "gemma2": Family(fields=(*_LLAMA, *_CAPS, _WINDOW), biases=_ATTENTION_BIAS, query_width_layers=46, windows=True),
    "gemma3": Family(
        fields=(
            *(entry for entry in _LLAMA if entry is not _BASE),
            Field("rope.freq_base", "rope_parameters.full_attention.rope_theta"),
            Field("rope.freq_base_swa", "rope_parameters.sliding_attention.rope_theta"),
            *_CAPS,
            _WINDOW,
        ),
        rotary="rope_parameters.full_attention",
        biases=_ATTENTION_BIAS,
        query_width_layers=62,
        windows=True,
    ),
    "phi3": Family(
        fields=(*_LLAMA, _WINDOW, Field(ORIGINAL_LENGTH, "original_max_position_embeddings")), partial_rotary=True
    ),
    "gpt2": Family(
        fields=(*_SHAPE, Field("feed_forward_length", "n_inner"), Field(_LAYER_NORM, "layer_norm_epsilon")),
        rotary=None,
    ),
    "stablelm": Family(
        fields=(
            *_GROUPED,
            _WIDTH,
            _BASE,
            Field(_LAYER_NORM, "layer_norm_eps"),
            Field("use_parallel_residual", "use_parallel_residual"),
        ),
        partial_rotary=True,
        biases={"attn_q.bias": "use_qkv_bias"},
    ),
    "starcoder2": Family(
        fields=(*_GROUPED, _WIDTH, _HEAD, _BASE, Field(_LAYER_NORM, "norm_epsilon")),
        biases={"attn_q.bias": "use_bias"},
    ),
    "nemotron": Family(
        fields=(*_GROUPED, _WIDTH, _HEAD, _BASE, Field(_LAYER_NORM, "norm_eps")),
        partial_rotary=True,
        biases={**_ATTENTION_BIAS, "ffn_up.bias": "mlp_bias"},
    ),
    # Falcon 7B: with more key-value heads, q, k and v lie in one matrix in another order.
    "falcon": Family(
        fields=(
            *_SHAPE,
            Field("feed_forward_length", "ffn_hidden_size"),
            _BASE,
            Field(_LAYER_NORM, "layer_norm_epsilon"),
        ),
        biases={"attn_qkv.bias": "bias"},
        fixed={"attention.head_count_kv": 1},
    ),
    "bloom": Family(
        fields=(*_SHAPE[1:], Field("context_length", "seq_length"), Field(_LAYER_NORM, "layer_norm_epsilon")),
        rotary=None,
        silent=frozenset({"attention.head_count_kv", "feed_forward_length"}),
    ),
}

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
