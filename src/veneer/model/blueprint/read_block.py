"""Describes a block: its two halves, the norms around them, and how they are added to the residual stream."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from veneer.model.blueprint.decoder import Block, BlockNorms, Sublayer
from veneer.model.blueprint.masks import FULL, MAKERS, RECURRENT, SLIDING, is_recurrent, types_in
from veneer.model.blueprint.names import NormNames
from veneer.model.blueprint.norms import read_norm
from veneer.model.blueprint.parts import (
    Absent,
    Attention,
    Experts,
    FeedForward,
    KeepsState,
    Mixer,
    Norm,
    Several,
    Strange,
)
from veneer.model.blueprint.read_attention import layer_type_of, read_attention
from veneer.model.blueprint.read_delta_net import read_delta_net
from veneer.model.blueprint.read_feed_forward import read_feed_forward
from veneer.model.blueprint.read_forward import odd_in_forward, takes_hidden_states, values_returned
from veneer.model.blueprint.read_short_conv import read_short_conv
from veneer.model.blueprint.source import BlockSource, all_of, first, has_all, undescribed
from veneer.model.inplace import plain_class

PARALLEL = ("use_parallel_residual", "parallel_attn")  # config keys
UNKNOWN = BlockNorms(attention=None, feed_forward=None)


def read_block(source: BlockSource, block: nn.Module, layer: int) -> Block:
    """Return the description of block number ``layer``. Parts that the description cannot express are listed in its
    ``strange``, with the reasons.
    """
    path, names = source.path(block), source.names
    single = first(block, names.single)
    mixing, feeding = (all_of(block, each) for each in ((*names.attention, *names.mixers), names.feed_forward))
    if single is not None and not mixing and not feeding:
        return _single_part(source, block, cast(nn.Module, getattr(block, single)), layer)
    in_block = not feeding and any(has_all(block, inner.all) for inner in names.inner)
    if not mixing or not (feeding or in_block):
        return _unknown(path, "no attention and feed-forward part of known names in it")
    norm_names = next((each for each in names.norms if _fits(block, each)), None)
    if norm_names is None:
        return _unknown(path, "no norms of known names in it")
    norms = _norms(source, block, norm_names)
    if norms is None:
        return _unknown(path, "its norms are not RMSNorms or LayerNorms")
    attention = _several(source, mixing) or _mixing(source, mixing[0], layer)
    if isinstance(attention, str):
        return _unknown(path, attention)
    holder = feeding[0] if feeding else block
    feed_forward = _several(source, feeding) or read_feed_forward(source, holder, in_block=in_block)
    known = [*mixing, *feeding, *(getattr(block, name) for name in norm_names.all)]
    known += [] if feeding else [m for inner in names.inner for m in _children(block, inner.all)]
    return Block(
        path=path,
        attention=attention,
        feed_forward=feed_forward,
        norms=norms,
        parallel=_parallel(source, norms),
        residual_multiplier=_multiplier(source, block),
        attention_sublayer=_attention_sublayer(source, block, attention, norms),
        feed_forward_sublayer=_feed_forward_sublayer(source, block, feed_forward, norms, in_block),
        other=(*undescribed(source, block, known), *_beside_parts(source, block)),
        returns=values_returned(block),
    )


def _single_part(source: BlockSource, block: nn.Module, part: nn.Module, layer: int) -> Block:
    """Return the description of a block with one half (Nemotron-H): one that mixes tokens, or a feed-forward part."""
    path, norm_name = source.path(block), source.names.single_norm
    norm = read_norm(source, getattr(block, norm_name, None))
    if norm is None:
        return _unknown(path, f"{norm_name} is no norm of it")
    absent = Absent(path=source.path(part), reason="the block has one half")
    types = types_in(source.config)
    mixes = layer >= len(types) or types[layer] in MAKERS
    attention = _mixing(source, part, layer) if mixes else absent
    if isinstance(attention, str):
        return _unknown(path, attention)
    feed_forward = absent if mixes else read_feed_forward(source, part)
    norms = BlockNorms(attention=norm if mixes else None, feed_forward=None if mixes else norm)
    return Block(
        path=path,
        attention=attention,
        feed_forward=feed_forward,
        norms=norms,
        parallel=False,
        residual_multiplier=_multiplier(source, block),
        attention_sublayer=_attention_sublayer(source, block, attention, norms),
        feed_forward_sublayer=_feed_forward_sublayer(source, block, feed_forward, norms, False),
        other=(*undescribed(source, block, [part, getattr(block, norm_name)]), *_beside_parts(source, block)),
        returns=values_returned(block),
    )


def _several(source: BlockSource, parts: list[nn.Module]) -> Several | None:
    """Return a half of a block as one part that adds the outputs of several modules (Falcon-H1, Granite's experts).
    Return None if the half has fewer than two modules.
    """
    if len(parts) < 2:
        return None
    names = " and ".join(source.path(part).rpartition(".")[2] for part in parts)
    return Several(path=source.path(parts[0]), reason=f"it adds the outputs of {names}")


def _mixing(source: BlockSource, module: nn.Module, layer: int) -> Attention | KeepsState | Strange | str:
    """Return the description of the part that mixes tokens: attention, a part that keeps a state, or a part known only
    by its path. Return a reason (str) if the block cannot be described at all.
    """
    types = types_in(source.config)
    layer_type = layer_type_of(module) or (types[layer] if layer < len(types) else None)
    name, kind = source.path(module).rpartition(".")[2], plain_class(type(module)).__name__
    found: Attention | KeepsState | Strange
    if name in source.names.mixers or (layer_type is not None and is_recurrent(layer_type)):
        reason = f"it keeps a state, which {kind} computes by its own code"
        strange = Mixer(path=source.path(module), reason=reason, layer_type=RECURRENT)
        found = read_short_conv(source, module) or read_delta_net(source, module) or strange
    elif layer_type in (None, FULL, SLIDING):
        found = read_attention(source, module, layer)
    elif layer_type in MAKERS:
        reason = f"it is of type {layer_type}, which {kind} computes by its own code"
        found = Mixer(path=source.path(module), reason=reason, layer_type=layer_type)
    else:
        return f"it is of type {layer_type}, whose mask is not known"
    if isinstance(found, Strange) and not takes_hidden_states(module):
        return f"its attention does not take hidden_states by that name, and {found.reason}"
    return found


def _multiplier(source: BlockSource, block: nn.Module) -> float:
    """Return the factor of both halves' outputs. It is the block's attribute ``residual_scale`` (MiniCPM 3) or else the
    config's ``residual_multiplier``; the default is 1.
    """
    own = getattr(block, "residual_scale", None)
    return float(own if isinstance(own, float) else getattr(source.config, "residual_multiplier", 1.0))


def _beside_parts(source: BlockSource, block: nn.Module) -> list[Strange]:
    """Return at most one `Strange` part, with the reason why the description cannot express the block itself.

    The reason may be a buffer (Gemma 4 multiplies by one), a factor of the residual stream (MiniMax), or further own
    code.
    """
    names = [name for name, _ in block.named_buffers(recurse=False)]
    names += [name for name in vars(block) if name.endswith("_alpha_factor")]
    told = f"it holds {', '.join(names)}, which the model description does not cover" if names else None
    odd = told or (None if source.listed else odd_in_forward(block))
    return [] if odd is None else [Strange(path=source.path(block), reason=odd)]


def _fits(block: nn.Module, names: NormNames) -> bool:
    """Return True if a block has norms under these names. An identity is not a norm (LFM3)."""
    found = [getattr(block, name, None) for name in names.all]
    return bool(found) and all(isinstance(m, nn.Module) and not isinstance(m, nn.Identity) for m in found)


def _norms(source: BlockSource, block: Any, names: NormNames) -> BlockNorms | None:
    """Return the norms with these names, or None if one of the modules is not a norm."""
    found = {name: read_norm(source, getattr(block, name)) for name in names.all}
    if any(norm is None for norm in found.values()):
        return None

    def of(name: str | None) -> Norm | None:
        return None if name is None else found[name]

    return BlockNorms(
        attention=of(names.attention),
        feed_forward=of(names.feed_forward),
        attention_post=of(names.attention_post),
        feed_forward_post=of(names.feed_forward_post),
    )


def _children(block: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [getattr(block, name) for name in names if hasattr(block, name)]


def _parallel(source: BlockSource, norms: BlockNorms) -> bool:
    """Return True if one norm precedes both halves, or if the config says so."""
    one = norms.attention is not None and norms.attention == norms.feed_forward
    return one or any(bool(getattr(source.config, key, False)) for key in PARALLEL)


def _attention_sublayer(
    source: BlockSource, block: nn.Module, attention: Attention | KeepsState | Strange, norms: BlockNorms
) -> Sublayer | None:
    if isinstance(attention, Strange):
        return None
    if isinstance(attention, Attention) and "attention" in source.family.adds_inside:
        return Sublayer(input_path=attention.qkv[0].path, output_path=attention.out.path)
    dropout = _dropout(source, block, source.names.attention_dropout)
    post = norms.attention_post.path if norms.attention_post else None
    return Sublayer(input_path=attention.path, output_path=dropout or post or attention.path)


def _feed_forward_sublayer(
    source: BlockSource, block: nn.Module, part: FeedForward | Experts | Strange, norms: BlockNorms, in_block: bool
) -> Sublayer | None:
    if isinstance(part, Strange):
        return None
    if isinstance(part, FeedForward) and (in_block or "mlp" in source.family.adds_inside):
        return Sublayer(input_path=part.inner[0].path, output_path=part.down.path)
    post = norms.feed_forward_post.path if norms.feed_forward_post else None
    dropout = _dropout(source, block, source.names.feed_forward_dropout)
    return Sublayer(input_path=part.path, output_path=dropout or post or part.path)


def _dropout(source: BlockSource, block: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the path of the dropout after a half, if it is a module."""
    found = (getattr(block, name) for name in names if has_all(block, (name,)))
    return next((source.path(module) for module in found), None)


def _unknown(path: str, reason: str) -> Block:
    part = Strange(path=path, reason=reason)
    return Block(
        path=path,
        attention=part,
        feed_forward=part,
        norms=UNKNOWN,
        parallel=False,
        residual_multiplier=1.0,
        attention_sublayer=None,
        feed_forward_sublayer=None,
    )
