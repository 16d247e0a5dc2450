"""Summary of a decoder in a few lines, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

from veneer.model.blueprint.decoder import Block, Decoder
from veneer.model.blueprint.parts import DeltaNet, Experts, ShortConv
from veneer.model.blueprint.rotary import LongRopeScaling, Rotary

_SHOWN = 3  # of the parts that are not described


def summary(decoder: Decoder) -> dict[str, str]:
    """Return a decoder's parts in words, by title: layers, heads, window, rotary embedding, experts, unknown parts."""
    attentions = decoder.attentions
    experts = [block.feed_forward for block in decoder.blocks if isinstance(block.feed_forward, Experts)]
    seen = [block.attention.kernel if isinstance(block.attention, ShortConv) else None for block in decoder.blocks]
    lines = {
        "layers": f"{len(decoder.blocks)}",
        "attention heads": _counted(part.heads.n_heads for part in attentions),
        "key/value heads": _counted(part.heads.n_kv_heads for part in attentions),
        "head width": _counted(part.heads.head_dim for part in attentions),
        "short convolution": _in_layers(seen, "tokens"),
        "gated delta rule": _in_layers(map(_state, decoder.blocks)),
        "window": _in_layers((part.window for part in attentions), "tokens"),
        "rotary": _in_layers(_told(part.rotary, part.heads.head_dim) for part in attentions),
        "experts": _in_layers(f"{part.top_k} of {part.n_experts}" for part in experts),
        "not described": "; ".join(dict.fromkeys(part.reason for part in decoder.strange[:_SHOWN])),
    }
    return {title: line for title, line in lines.items() if line}


def _state(block: Block) -> str | None:
    part = block.attention
    return f"{part.n_v_heads} heads of {part.k_width} × {part.v_width}" if isinstance(part, DeltaNet) else None


def _told(rotary: Rotary | None, head_dim: int) -> str | None:
    if rotary is None:
        return None
    share = "" if rotary.dim == head_dim else f", {rotary.dim} of {head_dim} numbers"
    return f"theta {rotary.theta:,g}{share}{_scaling(rotary)}{', neighbouring pairs' if rotary.interleaved else ''}"


def _scaling(rotary: Rotary) -> str:
    scaling = rotary.scaling
    if scaling is None:
        return ""
    kind = type(scaling).__name__.removesuffix("Scaling")
    return f", {kind}" if isinstance(scaling, LongRopeScaling) else f", {kind} ×{scaling.factor:g}"


def _counted(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in dict.fromkeys(values))


def _in_layers(values: Iterable[Hashable | None], unit: str = "") -> str:
    """Return the different values as text, given one value for each layer. A value that not all layers have is followed
    by its number of layers; None is left out.
    """
    counts = Counter(values)
    total = sum(counts.values())
    held = {f"{value} {unit}".strip(): n for value, n in counts.items() if value is not None}
    return "; ".join(f"{what} in {n} of {total} layers" if n < total else what for what, n in held.items())
