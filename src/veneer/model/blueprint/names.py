"""Names that transformers' models give to their parts: alternatives for each part, of which the first match counts.

Such names occur only here and in `families`, which holds names that only one family has. Default targets of PEFT that
no role expresses are in `contract.family_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.model.blueprint.parts import Role

NamedOrder = Literal["joined", "by head", "by group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Names of the norms before a block's two halves, and after them. ``feed_forward`` may equal ``attention`` if one
    norm precedes both halves.
    """

    attention: str | None
    feed_forward: str | None
    attention_post: str | None = None
    feed_forward_post: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Names of the norms, each once."""
        names = (self.attention, self.feed_forward, self.attention_post, self.feed_forward_post)
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerNames:
    """Names of a feed-forward part's layers: those that compute gate and up (or up alone), and the one after the
    activation.
    """

    inner: tuple[tuple[Role, str], ...]
    down: str

    @property
    def all(self) -> tuple[str, ...]:
        """Names of all layers."""
        return (*(name for _, name in self.inner), self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Possible attribute names of every part, in the module that holds the part. The first name that the module has is
    used.

    ``joined`` maps the names of joined q, k and v layers to the order of their heads. "by head" has two meanings. If k
    and v have as many heads as q, the layer's output is q, k and v of each head in turn. If they have fewer, it is all
    of q, then all of k, then all of v.
    """

    positions: tuple[str, ...] = ("wpe", "embed_positions")
    embedding_norm: tuple[str, ...] = ("word_embeddings_layernorm",)
    final_norm: tuple[str, ...] = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
    attention: tuple[str, ...] = ("self_attn", "attention", "attn", "self_attention")
    mixers: tuple[str, ...] = ("mamba", "linear_attn", "conv")
    single: tuple[str, ...] = ("mixer",)  # the only part of a block, whose norm is ``single_norm``
    single_norm: str = "norm"
    q_k_v: tuple[tuple[str, str, str], ...] = (("q_proj", "k_proj", "v_proj"),)
    joined: tuple[tuple[str, NamedOrder], ...] = (
        ("qkv_proj", "joined"),
        ("query_key_value", "by head"),
        ("c_attn", "joined"),
    )
    out: tuple[str, ...] = ("o_proj", "dense", "c_proj", "out_proj")
    head_norms: tuple[tuple[str, str], ...] = (
        ("q_norm", "k_norm"),
        ("q_layernorm", "k_layernorm"),
        ("query_layernorm", "key_layernorm"),
    )
    head_dim: tuple[str, ...] = ("head_dim", "head_size")
    norms: tuple[NormNames, ...] = (
        NormNames(
            attention="input_layernorm",
            feed_forward="pre_feedforward_layernorm",
            attention_post="post_attention_layernorm",
            feed_forward_post="post_feedforward_layernorm",
        ),
        NormNames(
            attention="input_layernorm",
            feed_forward="post_attention_layernorm",
            attention_post="post_self_attn_layernorm",
            feed_forward_post="post_mlp_layernorm",
        ),
        NormNames(attention="input_layernorm", feed_forward="pre_feedforward_layernorm"),
        NormNames(
            attention="input_layernorm",
            feed_forward="post_attention_layernorm",
            attention_post="post_norm1",
            feed_forward_post="post_norm2",
        ),
        NormNames(
            attention=None,
            feed_forward=None,
            attention_post="post_attention_layernorm",
            feed_forward_post="post_feedforward_layernorm",
        ),
        NormNames(attention="input_layernorm", feed_forward="post_attention_layernorm"),
        NormNames(attention="ln_1", feed_forward="ln_2"),
        NormNames(attention="self_attn_layer_norm", feed_forward="final_layer_norm"),
        NormNames(attention="input_layernorm", feed_forward="pre_ff_layernorm"),
        NormNames(
            attention="operator_norm",
            feed_forward="ffn_norm",
            attention_post="post_operator_norm",
            feed_forward_post="post_ffn_norm",
        ),
        NormNames(attention="operator_norm", feed_forward="ffn_norm"),
        NormNames(attention="input_layernorm", feed_forward="input_layernorm"),
        NormNames(attention="ln_1", feed_forward="ln_1"),
    )
    feed_forward: tuple[str, ...] = ("mlp", "feed_forward", "shared_mlp", "block_sparse_moe")
    inner: tuple[InnerNames, ...] = (
        InnerNames(inner=(("gate", "gate_proj"), ("up", "up_proj")), down="down_proj"),
        InnerNames(inner=(("gate_up", "gate_up_proj"),), down="down_proj"),
        InnerNames(inner=(("up", "up_proj"),), down="down_proj"),
        InnerNames(inner=(("up", "fc1"),), down="fc2"),
        InnerNames(inner=(("up", "dense_h_to_4h"),), down="dense_4h_to_h"),
        InnerNames(inner=(("up", "c_fc"),), down="c_proj"),
        InnerNames(inner=(("up", "fc_in"),), down="fc_out"),
        InnerNames(inner=(("gate", "w1"), ("up", "w3")), down="w2"),
        InnerNames(inner=(("gate_up", "input_linear"),), down="output_linear"),
    )
    activation: tuple[str, ...] = ("act_fn", "activation_fn", "act", "gelu_impl", "activation")
    attention_dropout: tuple[str, ...] = ("post_attention_dropout", "resid_attn_dropout")
    feed_forward_dropout: tuple[str, ...] = ("post_mlp_dropout", "resid_mlp_dropout", "dropout")


COMMON = Names()
EMBEDDING_MULTIPLIERS = ("scalar_embed_scale", "embed_scale")  # on a table that multiplies what it looks up
EXPERTS, ROUTERS = "experts", ("gate", "router")  # children of a mixture: the module with the stacks, and the router
STACKS = ("gate_up_proj", "down_proj")
UNGATED_STACKS = ("up_proj", "down_proj")
ROUTING_LAYER = "wg"  # a linear layer within the router, which computes the scores
SHARED, SHARED_GATE = ("shared_expert", "shared_experts", "shared_mlp"), "shared_expert_gate"
CORRECTIONS = ("e_score_correction_bias", "expert_bias")  # buffers of the router, or of the mixture
# The layers of one expert by name, in files that hold each apart.
EXPERT_LAYERS: dict[str, Role] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip

JOINED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_QKV = ("query_key_value", "c_attn", "qkv_proj", "Wqkv")
# What a role is called in models that have no description, encoders and encoder-decoders among them.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q", "query_proj", *_QKV),
    "k": ("k_proj", "key", "k", "key_proj", *_QKV),
    "v": ("v_proj", "value", "v", "value_proj", *_QKV),
    "qkv": _QKV,
    "o": ("o_proj", "out_proj"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj", "fc1"),
    "down": ("down_proj", "fc2", "output.dense", "wo", "dense_4h_to_h", "mlp.c_proj", "w2"),
}

# PEFT's own lists, which its files rely on: the names that it knows a task's head by, whichever of them a model has,
# and those of embeddings and head, whose whole weight is saved where they are targeted.
CLASSIFIERS = ("classifier", "score")
TASK_HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
MODEL_ENDS = ("embed_tokens", "lm_head")
# Unsloth's default targets: every layer of a block of Llama's.
LLAMA_LAYERS = (*COMMON.q_k_v[0], COMMON.out[0], *COMMON.inner[0].all)
