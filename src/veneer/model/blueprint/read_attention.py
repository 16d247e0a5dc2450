"""Reading of a block's attention: its layers by role, its heads, its scale, mask, cap and rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from veneer.model.blueprint.heads import HeadLayout, HeadOrder
from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.norms import read_norm
from veneer.model.blueprint.parts import Attention, Linear, Norm, Role, Strange
from veneer.model.blueprint.read_rotary import read_rotary, read_temperature, rotates, turns_neighbours
from veneer.model.blueprint.source import BlockSource, first, has_all, undescribed

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names in `config.layer_types`
Q_K_V: tuple[Role, ...] = ("q", "k", "v")


def window_of(attention: nn.Module) -> int | None:
    """Return the sliding window of an attention module; None if its layer attends to all earlier tokens."""
    config = getattr(attention, "config", None)
    if layer_type_of(attention) == FULL:
        return None
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return cast("int | None", window) or None  # configs say 0 for none


def layer_type_of(attention: nn.Module) -> str | None:
    """Return the type of an attention layer in the config; None if all layers are of one type."""
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    return None if types is None or index is None else cast(str, types[index])


# Fields of attention modules by their usual values, and what another value means.
_ODD: dict[str, tuple[float, str]] = {
    "mp_num": (1, "it joins q, v and k in groups"),
    "v_scale": (1.0, "it scales its values"),
}


def read_attention(source: BlockSource, module: nn.Module, layer: int) -> Attention | Strange:
    """Return the attention of block number ``layer``."""
    path = source.path(module)

    def strange(reason: str) -> Strange:
        return Strange(path=path, reason=reason)

    found = _projections(source, module)
    if isinstance(found, str):
        return strange(found)
    qkv, out, order = found
    heads = _heads(source, module, qkv, out, order)
    if heads is None:
        return strange("the sizes of its projections are no whole numbers of heads, or k and v have more than q")
    norms = _head_norms(source, module, heads)
    if isinstance(norms, str):
        return strange(norms)
    scale = _scale(module)
    if scale is None:
        return strange("it does not say by what it scales")
    if not getattr(module, "is_causal", True):
        return strange("it attends to later tokens too")
    odd = next((told for name, (usual, told) in _ODD.items() if getattr(module, name, usual) != usual), None)
    if odd is not None:
        return strange(odd)
    turning = rotates(source, module, layer)
    rotary = read_rotary(source, layer_type_of(module), heads.head_dim) if turning and not source.family.alibi else None
    if isinstance(rotary, str):
        return strange(rotary)
    if rotary is not None and turns_neighbours(module):
        rotary = replace(rotary, interleaved=True)
    parts = [getattr(module, n) for n in (*_names_of(source, module, qkv), *_norm_names(source, module))]
    rest = next(undescribed(source, module, [*parts, _out(source, module)]), None)
    cap, clip = getattr(module, "attn_logit_softcapping", None), getattr(source.config, "clip_qkv", None)
    return rest or Attention(
        path=path,
        qkv=qkv,
        out=out,
        heads=heads,
        scale=scale,
        window=window_of(module),
        softcap=None if cap is None else float(cap),
        rotary=rotary,
        alibi=source.family.alibi,
        q_norm=norms[0],
        k_norm=norms[1],
        clip=None if clip is None else float(clip),
        temperature=read_temperature(source),
    )


def _projections(source: BlockSource, module: nn.Module) -> tuple[tuple[Linear, ...], Linear, HeadOrder] | str:
    names, out = source.names, _out(source, module)
    apart = next((each for each in names.q_k_v if has_all(module, each)), None)
    joined = next((each for each in names.joined if has_all(module, each[:1])), None)
    if (apart is None and joined is None) or out is None:
        return "no q, k, v and o projections of known names in it"
    inner = apart or (cast("tuple[str, HeadOrder]", joined)[0],)
    layers = [getattr(module, name) for name in inner]
    if not all(is_linear(layer) for layer in (*layers, out)):
        return "its projections are no plain linear layers"
    roles = Q_K_V if apart else cast("tuple[Role, ...]", ("qkv",))
    qkv = tuple(read_linear(source, layer, role) for layer, role in zip(layers, roles, strict=True))
    order: HeadOrder = "apart" if apart else cast("tuple[str, HeadOrder]", joined)[1]
    return qkv, read_linear(source, out, "o"), order


def _out(source: BlockSource, module: nn.Module) -> nn.Module | None:
    name = first(module, source.names.out)
    return None if name is None else cast(nn.Module, getattr(module, name))


def _names_of(source: BlockSource, module: nn.Module, qkv: tuple[Linear, ...]) -> list[str]:
    start = len(source.path(module)) + 1
    return [linear.path[start:] for linear in qkv]


def _heads(
    source: BlockSource, module: nn.Module, qkv: tuple[Linear, ...], out: Linear, order: HeadOrder
) -> HeadLayout | None:
    name = first(module, source.names.head_dim)
    if name is None:
        return None
    head_dim = int(cast(int, getattr(module, name)))
    n_heads, rest = divmod(out.in_features, head_dim)
    n_all, rest_all = divmod(sum(linear.out_features for linear in qkv), head_dim)
    n_kv_heads = (n_all - n_heads) // 2
    if rest or rest_all or n_heads < 1 or n_kv_heads < 1 or n_all != n_heads + 2 * n_kv_heads:
        return None
    if order == "apart" and qkv[0].out_features != n_heads * head_dim:
        return None
    if order == "by head" and n_kv_heads != n_heads:
        order = "joined"
    return HeadLayout(order, n_heads, n_kv_heads, head_dim)


def _norm_names(source: BlockSource, module: nn.Module) -> tuple[str, ...]:
    return next((names for names in source.names.head_norms if first(module, names[:1]) is not None), ())


def _head_norms(source: BlockSource, module: nn.Module, heads: HeadLayout) -> tuple[Norm | None, Norm | None] | str:
    """Return the norms of q and k, or the reason why they have no description: they span neither one head nor all
    heads.
    """
    names = _norm_names(source, module)
    if not names:
        return None, None
    found = [read_norm(source, cast(nn.Module, getattr(module, name))) for name in names]
    for norm, n_heads in zip(found, (heads.n_heads, heads.n_kv_heads), strict=True):
        size = heads.head_dim
        if norm is None or norm.shape not in ((size,), (n_heads, size), (n_heads * size,)):
            return f"the norms {names[0]} and {names[1]} are none that act on a head or on all of them"
    return found[0], found[1]


def _scale(module: Any) -> float | None:
    """Return the factor of the scores. Some families store its inverse."""
    scale = getattr(module, "scaling", getattr(module, "inv_norm_factor", None))
    return float(scale) if isinstance(scale, int | float) else None
