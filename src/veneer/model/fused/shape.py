"""What a block is made of, by the names of its parts and by their values.

Names find the parts. What names do not say is left open: whether both halves read the same stream, and in which order a
joined projection gives heads. Every possibility is a `BlockShape`; the one that computes what the model's own code
computes is found by trying them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from torch import nn

from veneer.model.blueprint.heads import HeadLayout, HeadOrder
from veneer.model.fused.parts import NormKind, is_linear, norm_kind, size_of
from veneer.ops.activation import KINDS, activation_forward
from veneer.ops.attention import AttentionOptions
from veneer.ops.glu import ACTIVATIONS

ATTENTION = ("self_attn", "attention", "attn")
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names in `config.layer_types`
QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
OUT = ("o_proj", "dense", "c_proj")
HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
HEAD_DIM = ("head_dim", "head_size")
ACT = ("act_fn", "activation_fn", "act")
MLP = (
    (("gate_proj", "up_proj"), "down_proj", True),
    (("gate_up_proj",), "down_proj", True),
    (("fc1",), "fc2", False),
    (("dense_h_to_4h",), "dense_4h_to_h", False),
    (("c_fc",), "c_proj", False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """Names within the attention module, and what they amount to. ``options`` lack the window: see `window_of`."""

    qkv: tuple[str, ...]
    out: str
    heads: HeadLayout
    options: AttentionOptions
    head_norms: tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpParts:
    """Names within the feed-forward module, and what they amount to."""

    gate_up: tuple[str, ...]
    down: str
    act: str
    activation: str
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """The norms in front of the halves, and those behind them. ``mlp`` may be ``attention``: one norm for both."""

    attention: str
    mlp: str
    attention_post: str | None = None
    mlp_post: str | None = None

    @property
    def all(self) -> list[str]:
        """Each norm once."""
        names = (self.attention, self.mlp, self.attention_post, self.mlp_post)
        return list(dict.fromkeys(name for name in names if name is not None))


NORMS = (
    NormNames(
        attention="input_layernorm",
        mlp="pre_feedforward_layernorm",
        attention_post="post_attention_layernorm",
        mlp_post="post_feedforward_layernorm",
    ),
    NormNames(attention="input_layernorm", mlp="post_attention_layernorm"),
    NormNames(attention="ln_1", mlp="ln_2"),
    NormNames(attention="input_layernorm", mlp="input_layernorm"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What was recognised in a block. ``parallel``: the feed-forward half reads what the attention half reads.

    ``attention`` and ``mlp`` are None where that half is of another kind and runs as the model wrote it.
    """

    attention_name: str
    norms: NormNames
    kind: NormKind
    parallel: bool
    attention: AttentionParts | None
    mlp: MlpParts | None

    @property
    def variant(self) -> tuple[bool, HeadOrder | None]:
        """What names do not say."""
        return self.parallel, self.attention.heads.order if self.attention else None


def block_shapes(block: nn.Module) -> list[BlockShape] | str:
    """What the block may be, by the names of its parts; or in words what does not fit."""
    attention_name = next((name for name in ATTENTION if isinstance(getattr(block, name, None), nn.Module)), None)
    if attention_name is None or not isinstance(getattr(block, "mlp", None), nn.Module):
        return f"no mlp and one of {', '.join(ATTENTION)} in it"
    layer_type = _layer_type(getattr(block, attention_name))
    if layer_type not in (None, FULL, SLIDING):
        return f"it is of type {layer_type}, where {FULL} and {SLIDING} are known"
    norms = next((norms for norms in NORMS if all(hasattr(block, name) for name in norms.all)), None)
    if norms is None:
        return f"no {', or '.join(' and '.join(norms.all) for norms in NORMS)} in it"
    kinds = {norm_kind(getattr(block, name)) for name in norms.all}
    kind = kinds.pop()
    if kinds or kind is None:
        return "its norms are not RMSNorms or LayerNorms of one kind"
    mlp = _mlp_parts(cast(nn.Module, block.mlp))
    attentions: list[AttentionParts | None] = [*_attention_parts(getattr(block, attention_name), kind)]
    if mlp is None and not attentions:
        return "neither q, k, v and o projections nor a feed-forward part of known form in it"
    both = (False, True)
    flows = (True,) if norms.attention == norms.mlp else both[:1] if norms.attention_post else both
    return [
        BlockShape(
            attention_name=attention_name, norms=norms, kind=kind, parallel=parallel, attention=attention, mlp=mlp
        )
        for attention, parallel in product(attentions or [None], flows)
    ]


def window_of(attention: nn.Module) -> int | None:
    """The sliding window of an attention module; None where its layer sees all that came before."""
    config = getattr(attention, "config", None)
    if _layer_type(attention) == FULL:
        return None
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return cast("int | None", window) or None  # configs say 0 for none


def _layer_type(attention: nn.Module) -> str | None:
    """What the config calls the layer of an attention module; None where all layers are of one type."""
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    return None if types is None or index is None else cast(str, types[index])


def _attention_parts(module: nn.Module, kind: NormKind) -> list[AttentionParts]:
    """One for each order that heads may come in; empty where a part is missing or of another form."""
    qkv = next((names for names in QKV if all(hasattr(module, name) for name in names)), None)
    out, head_dim = _first(module, OUT), _first(module, HEAD_DIM)
    if qkv is None or out is None or head_dim is None or not all(hasattr(module, n) for n in ("scaling", "config")):
        return []
    if not all(is_linear(getattr(module, name)) for name in (*qkv, out)):
        return []
    head_norms = next((names for names in HEAD_NORMS if getattr(module, names[0], None) is not None), None)
    size = int(getattr(module, head_dim))
    for name in head_norms or ():
        norm = cast(nn.Module, getattr(module, name))
        if tuple(getattr(getattr(norm, "weight", None), "shape", ())) != (size,) or norm_kind(norm) != kind:
            return []  # over all heads at once (OLMo 2), or one for each
    options = AttentionOptions(scale=float(cast(float, module.scaling)))
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        options = replace(options, softcap=float(softcap))
    return [
        AttentionParts(qkv=qkv, out=out, heads=heads, options=options, head_norms=head_norms)
        for heads in _layouts([getattr(module, name) for name in qkv], getattr(module, out), size)
    ]


def _layouts(qkv: list[nn.Module], out: nn.Module, head_dim: int) -> list[HeadLayout]:
    n_heads, rest = divmod(size_of(out)[1], head_dim)
    n_all, rest_all = divmod(sum(size_of(module)[0] for module in qkv), head_dim)
    n_kv_heads = (n_all - n_heads) // 2
    if rest or rest_all or n_heads < 1 or n_kv_heads < 1 or n_all != n_heads + 2 * n_kv_heads:
        return []
    orders: list[HeadOrder] = ["apart"] if len(qkv) == 3 else ["joined"]
    if len(qkv) == 1 and n_heads == n_kv_heads:
        orders.append("by head")
    return [HeadLayout(order, n_heads, n_kv_heads, head_dim) for order in orders]


def _mlp_parts(module: nn.Module) -> MlpParts | None:
    act = _first(module, ACT)
    found = next((form for form in MLP if all(hasattr(module, name) for name in (*form[0], form[1]))), None)
    if act is None or found is None or not all(is_linear(getattr(module, name)) for name in (*found[0], found[1])):
        return None
    gate_up, down, gated = found
    n_inner = size_of(getattr(module, down))[1]
    if sum(size_of(getattr(module, name))[0] for name in gate_up) != (2 * n_inner if gated else n_inner):
        return None  # fc1 may hold a gate (Moshi)
    activation = _activation(cast(Any, module), act, ACTIVATIONS if gated else KINDS)
    if activation is None:
        return None
    return MlpParts(gate_up=gate_up, down=down, act=act, activation=activation, gated=gated)


def _activation(module: Any, act: str, known: tuple[str, ...]) -> str | None:
    """Which activation a module has, found by its values."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    given = getattr(module, act)(x)
    return next((name for name in known if torch.allclose(given, activation_forward(x, name), atol=1e-7)), None)


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if getattr(module, name, None) is not None), None)
