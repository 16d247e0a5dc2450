"""Describes a block's attention: its layers by role, heads, scale, mask, cap and rotary embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from veneer.model.blueprint.alibi import Alibi
from veneer.model.blueprint.heads import HeadLayout, HeadOrder
from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.masks import FULL, types_in
from veneer.model.blueprint.names import NamedOrder
from veneer.model.blueprint.norms import read_norm
from veneer.model.blueprint.parts import Attention, Linear, Norm, Role, Strange
from veneer.model.blueprint.read_forward import names_in_order
from veneer.model.blueprint.read_rotary import ROTATE, read_rotary, read_temperature, rotates, turns_of
from veneer.model.blueprint.rotary import Rotary
from veneer.model.blueprint.source import BlockSource, first, has_all, undescribed

Q_K_V: tuple[Role, ...] = ("q", "k", "v")
SINKS = "sinks"


def window_of(attention: nn.Module) -> int | None:
    """Return the sliding window of an attention module, or None if its layer attends to all earlier tokens."""
    config = getattr(attention, "config", None)
    if layer_type_of(attention) == FULL:
        return None
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return cast("int | None", window) or None  # configs say 0 for none


def layer_type_of(attention: nn.Module) -> str | None:
    """Return the type of an attention layer in the config, or None if all layers have one type."""
    types, index = types_in(getattr(attention, "config", None)), getattr(attention, "layer_idx", None)
    return types[index] if types and index is not None else None


# Fields of attention modules by their usual values, and what another value means.
_ODD: dict[str, tuple[float, str]] = {
    "mp_num": (1, "it joins q, v and k in groups"),
    "v_scale": (1.0, "it scales its values"),
}


class _OddError(Exception):
    """Error for attention that the description cannot express; the argument is the reason."""


def read_attention(source: BlockSource, module: nn.Module, layer: int) -> Attention | Strange:
    """Return the description of the attention of block number ``layer``, or a `Strange` part with the reason why it
    cannot be described.
    """
    try:
        return _read(source, module, layer)
    except _OddError as odd:
        return Strange(path=source.path(module), reason=str(odd))


def _read(source: BlockSource, module: nn.Module, layer: int) -> Attention | Strange:
    qkv, out, order = _projections(source, module)
    heads = _heads(source, module, qkv, out, order)
    q_norm, k_norm = _head_norms(source, module, heads)
    scale = _scale(module)
    _require_usual(module)
    rotary = _rotary(source, module, layer, heads)
    sinks = _sinks(source, module, heads)
    rest = _rest(source, module, qkv, sinks)
    cap, clip = getattr(module, "attn_logit_softcapping", None), _clip(source, module)
    return rest or Attention(
        path=source.path(module),
        qkv=qkv,
        out=out,
        heads=heads,
        scale=scale,
        window=window_of(module),
        softcap=None if cap is None else float(cap),
        rotary=rotary,
        alibi=_alibi(source, heads, scale),
        q_norm=q_norm,
        k_norm=k_norm,
        norms_after_rotary=rotary is not None and _norms_come_last(source, module),
        clip=None if clip is None else float(clip),
        temperature=read_temperature(source),
        sinks=f"{source.path(module)}.{sinks}" if sinks else "",
    )


def _projections(source: BlockSource, module: nn.Module) -> tuple[tuple[Linear, ...], Linear, NamedOrder | None]:
    names, out = source.names, _out(source, module)
    apart = next((each for each in names.q_k_v if has_all(module, each)), None)
    joined = next((each for each in names.joined if has_all(module, each[:1])), None)
    if (apart is None and joined is None) or out is None:
        raise _OddError("it has no q, k, v and o projections with known names")
    inner = apart or (cast("tuple[str, NamedOrder]", joined)[0],)
    layers = [getattr(module, name) for name in inner]
    if not all(is_linear(layer) for layer in (*layers, out)):
        raise _OddError("its projections are not all linear layers")
    roles = Q_K_V if apart else cast("tuple[Role, ...]", ("qkv",))
    qkv = tuple(read_linear(source, layer, role) for layer, role in zip(layers, roles, strict=True))
    return qkv, read_linear(source, out, "o"), None if apart else cast("tuple[str, NamedOrder]", joined)[1]


def _out(source: BlockSource, module: nn.Module) -> nn.Module | None:
    name = first(module, source.names.out)
    return None if name is None else cast(nn.Module, getattr(module, name))


def _heads(
    source: BlockSource, module: nn.Module, qkv: tuple[Linear, ...], out: Linear, order: NamedOrder | None
) -> HeadLayout:
    name = first(module, source.names.head_dim)
    found = None if name is None else _layout(int(cast(int, getattr(module, name))), qkv, out, order)
    if found is None:
        raise _OddError("its projections are not multiples of the head size, or k and v have more heads than q")
    return found


def _layout(head_dim: int, qkv: tuple[Linear, ...], out: Linear, order: NamedOrder | None) -> HeadLayout | None:
    """Return how heads lie in the outputs of q, k and v, or None if the sizes do not fit. ``order`` is the order of
    heads if one layer computes all three, or None.
    """
    n_heads, rest = divmod(out.in_features, head_dim)
    gated = order is None and qkv[0].out_features == 2 * out.in_features
    n_all, rest_all = divmod(sum(linear.out_features for linear in qkv), head_dim)
    n_of_q = 2 * n_heads if gated else n_heads
    n_kv_heads = (n_all - n_of_q) // 2
    if rest or rest_all or n_heads < 1 or n_kv_heads < 1 or n_all != n_of_q + 2 * n_kv_heads:
        return None
    if order is None and qkv[0].out_features != n_of_q * head_dim:
        return None
    in_groups = order == "by group" or (order == "by head" and n_kv_heads == n_heads)
    if in_groups and n_heads % n_kv_heads:
        return None
    apart: HeadOrder = "gated" if gated else "apart"
    return HeadLayout(apart if order is None else "by group" if in_groups else "joined", n_heads, n_kv_heads, head_dim)


def _norm_names(source: BlockSource, module: nn.Module) -> tuple[str, ...]:
    return next((names for names in source.names.head_norms if first(module, names[:1]) is not None), ())


def _head_norms(source: BlockSource, module: nn.Module, heads: HeadLayout) -> tuple[Norm | None, Norm | None]:
    """Return the norms of q and k, each None if there is none. Each spans one head or all heads."""
    names = _norm_names(source, module)
    if not names:
        return None, None
    found = [read_norm(source, cast(nn.Module, getattr(module, name)), heads.head_dim) for name in names]
    for norm, n_heads in zip(found, (heads.n_heads, heads.n_kv_heads), strict=True):
        size = heads.head_dim
        if norm is None or norm.shape not in ((size,), (n_heads, size), (n_heads * size,)):
            raise _OddError(f"the norms {names[0]} and {names[1]} act neither on each head nor on all heads together")
    return found[0], found[1]


def _norms_come_last(source: BlockSource, module: nn.Module) -> bool:
    """Return True if the forward of attention rotates queries before it calls their norm."""
    called = names_in_order(module)
    at = [called.index(name) for name in (ROTATE, *_norm_names(source, module)[:1]) if name in called]
    return len(at) == 2 and at[0] < at[1]


def _scale(module: Any) -> float:
    """Return the factor by which attention's scores are multiplied, from the attribute that holds it."""
    found = (getattr(module, name, None) for name in ("scaling", "inv_norm_factor", "softmax_scale"))
    scale = next((each for each in found if isinstance(each, int | float)), None)
    if scale is None:
        raise _OddError("it has no attribute with the scale of its scores")
    return float(scale)


def _clip(source: BlockSource, module: Any) -> float | None:
    """Return the bound to which q, k and v are clipped, or None if they are not. It is an attribute of MPT's attention
    (0 means none), and a value of OLMo's config.
    """
    held = getattr(module, "clip_qkv", None)
    return (held or None) if hasattr(module, "clip_qkv") else getattr(source.config, "clip_qkv", None)


def _require_usual(module: nn.Module) -> None:
    if not getattr(module, "is_causal", True):
        raise _OddError("it attends to later tokens too")
    for name, (usual, told) in _ODD.items():
        if getattr(module, name, usual) != usual:
            raise _OddError(told)


def _rotary(source: BlockSource, module: nn.Module, layer: int, heads: HeadLayout) -> Rotary | None:
    if not rotates(source, module, layer) or source.family.alibi(source.config):
        return None
    rotary = read_rotary(source, layer_type_of(module), heads.head_dim)
    if isinstance(rotary, str):
        raise _OddError(rotary)
    return None if rotary is None else replace(rotary, **turns_of(module))


def _alibi(source: BlockSource, heads: HeadLayout, scale: float) -> Alibi | None:
    if not source.family.alibi(source.config):
        return None
    rounded = source.family.rounds_alibi
    return Alibi(n_heads=heads.n_heads, scale=scale if rounded else 1.0, rounded=rounded)


def _sinks(source: BlockSource, module: nn.Module, heads: HeadLayout) -> str:
    """Return the name of the parameter with a logit for each head that joins its softmax (gpt-oss), or an empty
    string. Sinks beside ALiBi are not known.
    """
    held = module._parameters.get(SINKS)
    known = held is not None and held.shape == (heads.n_heads,) and not source.family.alibi(source.config)
    return SINKS if known else ""


def _rest(source: BlockSource, module: nn.Module, qkv: tuple[Linear, ...], sinks: str) -> Strange | None:
    """Return the submodules other than projections and norms as one `Strange` part, which the description cannot
    express. Return None if there are none.
    """
    start = len(source.path(module)) + 1
    names = (*(linear.path[start:] for linear in qkv), *_norm_names(source, module))
    known = [*(getattr(module, name) for name in names), _out(source, module)]
    return next(undescribed(source, module, known, (sinks,)), None)
