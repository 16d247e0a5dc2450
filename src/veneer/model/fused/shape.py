"""Part of a described block that fused kernels can run: its modules by their names within the block."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.model.blueprint.decoder import Block
from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.parts import Attention, Experts, FeedForward, Norm, Strange
from veneer.model.blueprint.read_attention import window_of as window_of  # as the modules have it now
from veneer.model.fused.parts import NormKind
from veneer.ops.attention import AttentionOptions
from veneer.ops.glu import ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """Names within the attention module, and the settings of its kernels. ``options`` lack the window: see
    `window_of`.
    """

    qkv: tuple[str, ...]
    out: str
    heads: HeadLayout
    options: AttentionOptions
    head_norms: tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpParts:
    """Names within the feed-forward module, and the settings of its kernels."""

    gate_up: tuple[str, ...]
    down: str
    act: str
    activation: str
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfNorms:
    """Norms before the halves, and those after them. ``mlp`` may be ``attention``: one norm for both."""

    attention: str
    mlp: str
    attention_post: str | None = None
    mlp_post: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Fused parts of a block, and the modules of its halves.

    ``parallel``: the feed-forward half reads the attention half's input. ``attention`` and ``mlp`` are None if that
    half is of another kind and runs the model's own code.
    """

    attention_name: str
    mlp_name: str
    norms: HalfNorms
    kind: NormKind
    parallel: bool
    attention: AttentionParts | None
    mlp: MlpParts | None


def block_shape(block: Block) -> BlockShape | str:
    """Return the parts of a block that the kernels can run, or, in words, the reason if they can run none."""
    norms, before = block.norms, len(block.path) + 1
    kinds = {_kind(norm) for norm in norms.all}
    attention, mlp = _attention_parts(block.attention, kinds), _mlp_parts(block.feed_forward)
    reason = _unfit(block)
    if reason is not None:
        return reason
    if norms.attention is None or norms.feed_forward is None:
        return "its halves have no norms in front of them"
    kind = kinds.pop()
    if kinds or kind is None:
        return "its norms are not RMSNorms or LayerNorms of one kind"
    if attention is None and mlp is None:
        return _reasons(block) or "its halves are of kinds that the kernels do not know"
    return BlockShape(
        attention_name=block.attention.path[before:],
        mlp_name=block.feed_forward.path[before:],
        norms=HalfNorms(
            attention=norms.attention.path[before:],
            mlp=norms.feed_forward.path[before:],
            attention_post=norms.attention_post.path[before:] if norms.attention_post else None,
            mlp_post=norms.feed_forward_post.path[before:] if norms.feed_forward_post else None,
        ),
        kind=kind,
        parallel=block.parallel,
        attention=attention,
        mlp=mlp,
    )


def _unfit(block: Block) -> str | None:
    """Features that no fused half of a block may have."""
    attention = block.attention
    if block.other or attention.path == block.path:  # what is strange is the block itself
        return _reasons(block)
    if block.feed_forward.path == block.path:
        return _reasons(block) or "the layers of its feed-forward half lie in the block itself"
    if block.residual_multiplier != 1:
        return (
            f"what its halves give is multiplied before it is added (residual_multiplier={block.residual_multiplier})"
        )
    if isinstance(attention, Strange):
        return None
    special = {
        "has a bias that falls with distance (ALiBi)": attention.alibi is not None,
        "rotates neighbouring numbers": attention.rotary is not None and attention.rotary.interleaved,
        "clips queries, keys and values": attention.clip is not None,
        "does more with positions than to rotate by them": _grows(attention),
    }
    return next((f"its attention {what}" for what, is_so in special.items() if is_so), None)


def _grows(attention: Attention) -> bool:
    """Return True if queries grow with position within the context."""
    rotary, temperature = attention.rotary, attention.temperature
    return temperature is not None and (rotary is None or rotary.max_positions > temperature.original_max_positions)


def _reasons(block: Block) -> str:
    return "; ".join(dict.fromkeys(part.reason for part in block.strange))


def _kind(norm: Norm) -> NormKind | None:
    """The name of a norm in the kernels; None where they have none like it."""
    if not norm.weight or len(norm.shape) != 1 or (norm.kind, norm.offset) == ("layer", 1.0):
        return None
    return "layer" if norm.kind == "layer" else "rms plus one" if norm.offset else "rms"


def _attention_parts(attention: Attention | Strange, kinds: set[NormKind | None]) -> AttentionParts | None:
    """None where the half runs as the model wrote it."""
    if isinstance(attention, Strange):
        return None
    if any(norm.shape != (attention.heads.head_dim,) or {_kind(norm)} != kinds for norm in attention.norms):
        return None  # over all heads at once (OLMo 2), or of another kind than the block's
    before = len(attention.path) + 1
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return AttentionParts(
        qkv=tuple(linear.path[before:] for linear in attention.qkv),
        out=attention.out.path[before:],
        heads=attention.heads,
        options=AttentionOptions(scale=attention.scale, softcap=attention.softcap),
        head_norms=(q_norm.path[before:], k_norm.path[before:]) if q_norm and k_norm else None,
    )


def _mlp_parts(part: FeedForward | Experts | Strange) -> MlpParts | None:
    """None where the half runs as the model wrote it."""
    if not isinstance(part, FeedForward):
        return None
    if part.gated and part.activation not in ACTIVATIONS:
        return None
    before = len(part.path) + 1
    return MlpParts(
        gate_up=tuple(linear.path[before:] for linear in part.inner),
        down=part.down.path[before:],
        act=part.act[before:],
        activation=part.activation,
        gated=part.gated,
    )
