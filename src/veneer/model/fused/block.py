"""Transformer block whose halves run fused if they can. Its class changes in place; the module stays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint import parts as blueprint
from veneer.model.fused.attention import AttentionHalf, RotationTables, attention_half
from veneer.model.fused.layout import LayoutMask
from veneer.model.fused.mlp import MlpHalf, mlp_half
from veneer.model.fused.parts import NoNorm, Norm, bottlenecks, computed_in, is_plain, layer_of, norm_of, with_masks
from veneer.model.fused.shape import AttentionParts, BlockShape, MlpParts, window_of
from veneer.model.inplace import InPlace, base_of
from veneer.model.memory.checkpointing import is_selective
from veneer.model.placed.residual import ResidualAdapters
from veneer.model.placed.structure import SublayerKind
from veneer.ops.linear.layer import LinearLayer

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
SPECIAL = (*CACHES, "encoder_hidden_states")


class FusedBlock(InPlace, nn.Module):
    """Mixin in front of the class of a block. Each half runs fused if everything in it supports that at the time."""

    fused_shape: BlockShape

    @property
    def gradient_checkpointing(self) -> bool:
        """Switch of transformers for checkpointing. If checkpointing is selective, the block does it itself."""
        return bool(vars(self).get("gradient_checkpointing")) and not is_selective(self)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        vars(self)["gradient_checkpointing"] = on

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = keywords_of(self, args, kwargs)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, LayoutMask):
            return _again(self, functools.partial(super().forward, **kwargs), hidden_states)
        return _run(self, hidden_states, mask, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(block: FusedBlock, x: Tensor, mask: LayoutMask, kwargs: dict[str, Any]) -> Any:
    shape = block.fused_shape
    attention, mlp = halves_now(block, x, kwargs)
    if attention is None:
        attention_module = getattr(block, shape.attention_name)
        kwargs = {**kwargs, "attention_mask": mask.dense_for(attention_module, x, window_of(attention_module))}
        if mlp is None:
            return _again(block, functools.partial(super(FusedBlock, block).forward, **kwargs), x)
        h = _again(block, functools.partial(own_attention, block, kwargs), x)
    else:
        positions = _positions(kwargs.get("position_embeddings"), mask, cast(AttentionParts, shape.attention))
        h = attention_half(x, masked_attention(block, attention, x), positions)
        h = h if attention.sums else x + _changed(block, "attention", h, x)
    if mlp is not None:
        mlp, fed = masked_mlp(block, mlp, x), x if shape.parallel else h
        if mlp.sums:
            return mlp_half(fed, mlp, h if shape.parallel else None)
        return h + _changed(block, "mlp", mlp_half(fed, mlp), fed)
    return _again(block, functools.partial(_own_mlp, block), x if shape.parallel else h, h)


def _changed(block: FusedBlock, kind: SublayerKind, change: Tensor, x: Tensor) -> Tensor:
    """The change of the stream x by one half, after its bottlenecks."""
    shape, acting = block.fused_shape, cast(ResidualAdapters, bottlenecks(block, kind))
    norm = shape.norms.attention if kind == "attention" else shape.norms.feed_forward
    return _weighed(block, acting.changed(change, _through(block, norm, x) if acting.reads_input else None))


def own_attention(block: FusedBlock, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """Return the stream after the attention half, computed by the model's own code."""
    shape, module = block.fused_shape, getattr(block, block.fused_shape.attention_name)
    change = module(hidden_states=_through(block, shape.norms.attention, x), **kwargs)[0]
    return x + _weighed(block, _through(block, shape.norms.attention_post, change))


def _own_mlp(block: FusedBlock, x: Tensor, stream: Tensor) -> Tensor:
    """The stream after the feed-forward half, by the model's own code."""
    shape, module = block.fused_shape, getattr(block, block.fused_shape.mlp_name)
    change = module(_through(block, shape.norms.feed_forward, x))
    change = change[0] if isinstance(change, tuple) else change  # with a router's scores
    return stream + _weighed(block, _through(block, shape.norms.feed_forward_post, change))


def _again(block: FusedBlock, function: Callable[..., Any], *args: Tensor) -> Any:
    """The model's own code, computed again in the backward pass where the block is checkpointed selectively."""
    return cast(Any, block)._gradient_checkpointing_func(function, *args) if is_selective(block) else function(*args)


def keywords_of(block: FusedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call after the stream by their names: GPT-2 passes its blocks some by position."""
    return {**dict(zip(_names(cast(Hashable, base_of(type(block)))), args, strict=False)), **kwargs} if args else kwargs


def halves_now(block: FusedBlock, x: Tensor, kwargs: dict[str, Any]) -> tuple[AttentionHalf | None, MlpHalf | None]:
    """Return the halves as they act in a call with these arguments; None for one that runs the model's own code."""
    dtype = computed_in(x)
    special = any(kwargs.get(name) is not None for name in SPECIAL)
    if special or dtype is None or not isinstance(kwargs.get("attention_mask"), LayoutMask):
        return None, None
    return halves_of(block, x.dtype, dtype)


def halves_of(
    block: FusedBlock, stream: torch.dtype, dtype: torch.dtype
) -> tuple[AttentionHalf | None, MlpHalf | None]:
    """Return the halves as they act now, on a stream of dtype ``stream`` and computed in ``dtype``.

    None replaces a half that is not fused.
    """
    if _drops(block):
        return None, None
    attention, mlp = _attention_of(block, stream, dtype), _mlp_of(block, stream, dtype)
    return (None, None) if block.fused_shape.whole and (attention is None or mlp is None) else (attention, mlp)


def _attention_of(block: FusedBlock, stream: torch.dtype, dtype: torch.dtype) -> AttentionHalf | None:
    shape, parts = block.fused_shape, block.fused_shape.attention
    module = getattr(block, shape.attention_name)
    if parts is None or not is_plain(module) or _drops_within(module):
        return None
    layers = _layers(module, (*parts.qkv, parts.out), dtype)
    norm, post = norm_of(block, shape.norms.attention, stream), norm_of(block, shape.norms.attention_post, stream)
    q_norm, k_norm = (norm_of(module, each, stream) for each in parts.head_norms or (None, None))
    if layers is None or norm is None or post is None or q_norm is None or k_norm is None:
        return None
    return AttentionHalf(
        dtype=dtype,
        norm=norm,
        qkv=layers[:-1],
        out=layers[-1],
        heads=parts.heads,
        options=replace(parts.options, window=window_of(module)),
        q_norm=_or_none(q_norm),
        k_norm=_or_none(k_norm),
        post_norm=_or_none(post),
        interleaved=parts.rotary is not None and parts.rotary.interleaved,
        multiplier=shape.multiplier,
        recomputes=is_selective(block),
        sums=bottlenecks(block, "attention") is None,
    )


def _mlp_of(block: FusedBlock, stream: torch.dtype, dtype: torch.dtype) -> MlpHalf | None:
    shape, parts = block.fused_shape, block.fused_shape.mlp
    module = _mlp_module(block)
    plain = module is block or is_plain(module)  # a block's own hooks run around it
    if parts is None or not plain or not is_plain(getattr(module, parts.act)) or _drops_within(module):
        return None
    layers = _layers(module, (*parts.gate_up, parts.down), dtype)
    norm, post = norm_of(block, shape.norms.feed_forward, stream), norm_of(block, shape.norms.feed_forward_post, stream)
    if layers is None or norm is None or post is None:
        return None
    return MlpHalf(
        dtype=dtype,
        norm=norm,
        gate_up=layers[:-1],
        down=layers[-1],
        activation=parts.activation,
        gated=parts.gated,
        post_norm=_or_none(post),
        multiplier=shape.multiplier,
        recomputes=is_selective(block),
        sums=bottlenecks(block, "mlp") is None,
    )


def masked_attention(block: FusedBlock, half: AttentionHalf, x: Tensor) -> AttentionHalf:
    """Return the attention half with its dropout masks drawn, in the order of the model's own code."""
    module, parts = getattr(block, block.fused_shape.attention_name), cast(AttentionParts, block.fused_shape.attention)
    *qkv, out = _with_masks(module, (*parts.qkv, parts.out), (*half.qkv, half.out), x)
    return replace(half, qkv=tuple(qkv), out=out)


def masked_mlp(block: FusedBlock, half: MlpHalf, x: Tensor) -> MlpHalf:
    """Return the feed-forward half with its dropout masks drawn, in the order of the model's own code."""
    module, parts = _mlp_module(block), cast(MlpParts, block.fused_shape.mlp)
    *gate_up, down = _with_masks(module, (*parts.gate_up, parts.down), (*half.gate_up, half.down), x)
    return replace(half, gate_up=tuple(gate_up), down=down)


def _with_masks(module: nn.Module, names: Sequence[str], layers: Sequence[LinearLayer], x: Tensor) -> list[LinearLayer]:
    return [with_masks(getattr(module, name), layer, x) for name, layer in zip(names, layers, strict=True)]


def _layers(module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> tuple[LinearLayer, ...] | None:
    """None if one of them cannot run fused."""
    found = [layer_of(getattr(module, name), dtype) for name in names]
    return None if any(layer is None for layer in found) else cast("tuple[LinearLayer, ...]", tuple(found))


def _drops(block: nn.Module) -> bool:
    """Return True if the block has dropout on the outputs of its halves."""
    return block.training and (_has_rate(block) or any(_is_dropout(part) for part in block.children()))


def _drops_within(module: nn.Module) -> bool:
    """Return True if a half has dropout within."""
    return module.training and (_has_rate(module) or any(_is_dropout(part) for part in module.modules()))


def _is_dropout(part: nn.Module) -> bool:
    return isinstance(part, nn.Dropout) and part.p > 0


def _has_rate(module: nn.Module) -> bool:
    """Return True if a module holds the rate of a dropout that it computes itself, such as ``attention_dropout``."""
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def _through(block: nn.Module, norm: blueprint.Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else cast(Tensor, getattr(block, norm.path)(x))


def _weighed(block: FusedBlock, change: Tensor) -> Tensor:
    multiplier = block.fused_shape.multiplier
    return change if multiplier == 1 else change * multiplier


def _mlp_module(block: FusedBlock) -> nn.Module:
    """The module that holds the feed-forward layers: the block itself, in OPT."""
    name = block.fused_shape.mlp_name
    return cast(nn.Module, getattr(block, name)) if name else block


def _or_none(norm: Norm) -> Norm | None:
    return None if isinstance(norm, NoNorm) else norm


def _positions(tables: tuple[Tensor, Tensor] | None, mask: LayoutMask, parts: AttentionParts) -> RotationTables:
    """Tables of cosines and sines as kernels read them, each angle once. transformers' hold it twice, GPT-J's once. A
    layer without rotation reads none.
    """
    if tables is None or parts.rotary is None:
        return RotationTables(None, None, mask.cu_seqlens)
    width = tables[0].shape[-1]
    once = slice(None) if 2 * width == parts.rotary.dim else slice(width // 2)
    first, second = (t[..., slice(None, None, 2) if parts.tables.pairs else once] for t in tables)
    cos, sin = (second, first) if parts.tables.sin_first else (first, second)
    return RotationTables(cos, sin, mask.cu_seqlens)


@functools.cache
def _names(cls: Hashable) -> list[str]:
    """The names of a block's positional arguments after the stream."""
    return list(inspect.signature(cast("type[nn.Module]", cls).forward).parameters)[2:]
