"""A transformer block whose halves run fused where they can. Its class changes in place; the module stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.fused.attention import AttentionHalf, Positions, attention_half
from veneer.model.fused.layout import LayoutMask
from veneer.model.fused.mlp import MlpHalf, mlp_half
from veneer.model.fused.parts import RmsNorm, is_plain, norm_of, norm_offset, projection_of
from veneer.model.inplace import InPlace
from veneer.ops.attention import AttentionOptions

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What was recognised in a block: names of its norms (with their offsets), and what its halves are made of.

    ``attention`` and ``activation`` are None where that half is of another kind and runs as the model wrote it.
    """

    attention_norm: str
    mlp_norm: str
    attention_post_norm: str | None
    mlp_post_norm: str | None
    offset: float
    attention: AttentionOptions | None
    activation: str | None


class FusedBlock(InPlace, nn.Module):
    """Mixed in front of the class of a block. Each half runs fused when everything in it allows that, now."""

    fused_shape: BlockShape

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, LayoutMask):
            return super().forward(hidden_states, *args, **kwargs)
        return _run(self, hidden_states, mask, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(block: FusedBlock, x: Tensor, mask: LayoutMask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape, tables = block.fused_shape, kwargs.get("position_embeddings")
    runs = not args and all(kwargs.get(name) is None for name in CACHES) and _computes_in(x.dtype)
    attention = attention_of(block, x.dtype) if runs and isinstance(tables, tuple) else None
    mlp = mlp_of(block, x.dtype) if runs else None
    if attention is None:
        attention_module = cast(Any, block).self_attn
        kwargs = {**kwargs, "attention_mask": mask.dense_for(attention_module, x, window_of(attention_module))}
        if mlp is None:
            return super(FusedBlock, block).forward(x, *args, **kwargs)
        normed = getattr(block, shape.attention_norm)(x)
        change = attention_module(hidden_states=normed, **kwargs)[0]
        h = x + _through(block, shape.attention_post_norm, change)
    else:
        h = attention_half(x, attention, _positions(cast("tuple[Tensor, Tensor]", tables), mask))
    if mlp is not None:
        return mlp_half(h, mlp)
    change = cast(Any, block).mlp(getattr(block, shape.mlp_norm)(h))
    return h + _through(block, shape.mlp_post_norm, change)


def block_shape(block: nn.Module) -> BlockShape | str:
    """The structure of a block, by the names of its parts; or in words what does not fit."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if not (isinstance(attention, nn.Module) and isinstance(mlp, nn.Module)):
        return "no self_attn and mlp in it"
    four = hasattr(block, "pre_feedforward_layernorm")
    names = ["input_layernorm", "pre_feedforward_layernorm" if four else "post_attention_layernorm"]
    after = ["post_attention_layernorm", "post_feedforward_layernorm"] if four else []
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in names + after):
        return f"no {' and '.join(names + after)} in it"
    offsets = {norm_offset(getattr(block, name)) for name in names + after}
    if len(offsets) > 1 or None in offsets:
        return "its norms are not RMSNorms of one kind"
    shape = BlockShape(
        attention_norm=names[0],
        mlp_norm=names[1],
        attention_post_norm=after[0] if four else None,
        mlp_post_norm=after[1] if four else None,
        offset=cast(float, offsets.pop()),
        attention=_attention_options(attention),
        activation=_activation(mlp),
    )
    if shape.attention is None and shape.activation is None:
        return "neither q, k, v and o projections nor a gated feed-forward part in it"
    return shape


def window_of(attention: nn.Module) -> int | None:
    """The sliding window of an attention module."""
    if hasattr(attention, "sliding_window"):
        return cast("int | None", attention.sliding_window)
    return cast("int | None", getattr(attention.config, "sliding_window", None))


def attention_of(block: FusedBlock, dtype: torch.dtype) -> AttentionHalf | None:
    """The attention half as it acts now; None where something in it cannot run fused."""
    shape, module = block.fused_shape, cast(Any, block).self_attn
    if shape.attention is None or not is_plain(module) or (block.training and module.attention_dropout):
        return None
    parts = [projection_of(getattr(module, name), dtype) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = _norms(block, shape.attention_norm, shape.attention_post_norm, dtype)
    head_norms = _head_norms(module, shape.offset, dtype)
    if norms is None or head_norms is None or any(p is None for p in parts):
        return None
    q, k, v, o = cast("list[Any]", parts)
    return AttentionHalf(
        norm=norms[0],
        qkv=(q, k, v),
        out=o,
        head_dim=module.head_dim,
        options=shape.attention,
        q_norm=head_norms[0],
        k_norm=head_norms[1],
        post_norm=norms[1],
    )


def mlp_of(block: FusedBlock, dtype: torch.dtype) -> MlpHalf | None:
    """The feed-forward half as it acts now; None where something in it cannot run fused."""
    shape, module = block.fused_shape, cast(Any, block).mlp
    if shape.activation is None or not is_plain(module) or not is_plain(module.act_fn):
        return None
    parts = [projection_of(getattr(module, name), dtype) for name in ("gate_proj", "up_proj", "down_proj")]
    norms = _norms(block, shape.mlp_norm, shape.mlp_post_norm, dtype)
    if norms is None or any(p is None for p in parts):
        return None
    gate, up, down = cast("list[Any]", parts)
    return MlpHalf(norm=norms[0], gate_up=(gate, up), down=down, activation=shape.activation, post_norm=norms[1])


def _norms(
    block: FusedBlock, name: str, post_name: str | None, dtype: torch.dtype
) -> tuple[RmsNorm, RmsNorm | None] | None:
    offset = block.fused_shape.offset
    norm = norm_of(getattr(block, name), offset, dtype)
    post = None if post_name is None else norm_of(getattr(block, post_name), offset, dtype)
    return None if norm is None or (post_name is not None and post is None) else (norm, post)


def _head_norms(module: nn.Module, offset: float, dtype: torch.dtype) -> tuple[RmsNorm | None, RmsNorm | None] | None:
    """The norms of queries and keys, where there are any; None where they cannot run fused."""
    if not hasattr(module, "q_norm"):
        return None, None
    q, k = (
        norm_of(cast(nn.Module, module.q_norm), offset, dtype),
        norm_of(cast(nn.Module, module.k_norm), offset, dtype),
    )
    return None if q is None or k is None else (q, k)


def _attention_options(module: nn.Module) -> AttentionOptions | None:
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout", "config")
    if not all(hasattr(module, name) for name in wanted):
        return None
    for name in ("q_norm", "k_norm"):
        if isinstance(norm := getattr(module, name, None), nn.Module) and norm.weight.shape != (module.head_dim,):
            return None  # over all heads at once (OLMo 2)
    options = AttentionOptions(scale=float(cast(float, module.scaling)), window=window_of(module))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return options if softcap is None else replace(options, softcap=float(softcap))


def _activation(module: nn.Module) -> str | None:
    """Which gated unit a feed-forward part is, found by the values of its activation."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    functional = nn.functional
    known = {
        "silu": functional.silu(x),
        "gelu": functional.gelu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }
    given = cast(Any, module).act_fn(x)
    return next((name for name, y in known.items() if torch.allclose(given, y, atol=1e-7)), None)


def _through(block: nn.Module, norm: str | None, change: Tensor) -> Tensor:
    return change if norm is None else cast(Tensor, getattr(block, norm)(change))


def _positions(tables: tuple[Tensor, Tensor], mask: LayoutMask) -> Positions:
    """transformers' tables hold every angle twice."""
    cos, sin = (t[..., : t.shape[-1] // 2] for t in tables)
    return Positions(cos, sin, mask.cu_seqlens)


def _computes_in(dtype: torch.dtype) -> bool:
    """Whether the layers compute in the stream's own dtype: autocast may say otherwise."""
    return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == dtype
