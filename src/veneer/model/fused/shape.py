"""Part of a described block that fused kernels can run: its modules by their names within the block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from veneer.model.blueprint.decoder import Block, BlockNorms
from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.parts import Attention, Experts, FeedForward, Norm, Strange
from veneer.model.blueprint.read_attention import window_of as window_of  # as the modules have it now
from veneer.model.blueprint.rotary import Rotary
from veneer.ops.attention import AttentionOptions
from veneer.ops.glu import ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Layout of a model's own cos and sin: each angle twice in a row (``pairs``), or sin in front (``sin_first``)."""

    pairs: bool = False
    sin_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """Names within the attention module, and the settings of its kernels. ``options`` lack the window: see
    `window_of`. ``tables``: how the model lays out the angles of ``rotary``.
    """

    qkv: tuple[str, ...]
    out: str
    heads: HeadLayout
    options: AttentionOptions
    head_norms: tuple[Norm, Norm] | None
    rotary: Rotary | None
    tables: Tables = Tables()


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpParts:
    """Names within the feed-forward module, and the settings of its kernels."""

    gate_up: tuple[str, ...]
    down: str
    act: str
    activation: str
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Fused parts of a block, and the modules of its halves. Paths start at the block, those of parts at their half.

    ``parallel``: the feed-forward half reads the attention half's input. ``attention`` and ``mlp`` are None if that
    half runs the model's own code; both do if one does in a block that is ``whole``. ``multiplier`` is that of the
    halves' outputs before they are added. ``mlp_name`` is empty if the layers lie in the block itself.
    """

    attention_name: str
    mlp_name: str
    norms: BlockNorms
    parallel: bool
    multiplier: float
    whole: bool
    attention: AttentionParts | None
    mlp: MlpParts | None

    @property
    def is_own(self) -> bool:
        """True if no half is fused."""
        return self.attention is None and self.mlp is None

    def leaving(self, *, attention: bool, mlp: bool) -> BlockShape:
        """Return the shape with only these halves fused."""
        both = attention and mlp
        return replace(
            self,
            attention=self.attention if attention and (both or not self.whole) else None,
            mlp=self.mlp if mlp and (both or not self.whole) else None,
        )


def block_shape(block: Block) -> BlockShape | str:
    """Return the parts of a block that the kernels can run; in words, the reason if its attention is unknown."""
    attention, part, before = block.attention, block.feed_forward, len(block.path) + 1
    if attention.path == block.path:
        return "; ".join(reasons(block))
    inside = block.attention_sublayer is not None and block.attention_sublayer.input_path != attention.path
    found = BlockShape(
        attention_name=attention.path[before:],
        mlp_name=part.path[before:],
        norms=_within(block.norms, before),
        parallel=block.parallel,
        multiplier=block.residual_multiplier,
        whole=inside or part.path == block.path,
        attention=_attention_parts(attention),
        mlp=_mlp_parts(part),
    )
    known = not block.other  # what is strange is the block itself
    return found.leaving(attention=known and found.attention is not None, mlp=known and found.mlp is not None)


def _within(norms: BlockNorms, before: int) -> BlockNorms:
    def of(norm: Norm | None) -> Norm | None:
        return None if norm is None else replace(norm, path=norm.path[before:])

    return BlockNorms(
        attention=of(norms.attention),
        feed_forward=of(norms.feed_forward),
        attention_post=of(norms.attention_post),
        feed_forward_post=of(norms.feed_forward_post),
    )


def reasons(block: Block) -> list[str]:
    """Return in words why halves of a block have no kernels; empty if both have."""
    parts = [part.reason for part in block.strange]
    attention = None if isinstance(block.attention, Strange) else unfit(block.attention)
    parts += [] if attention is None else [f"its attention {attention}"]
    if not parts and not isinstance(block.feed_forward, FeedForward):
        parts.append("its feed-forward half is of a kind that the kernels do not know")
    return list(dict.fromkeys(parts))


def unfit(attention: Attention) -> str | None:
    """Return in words what no kernel of training has; None if nothing."""
    special = {
        "has a bias that falls with distance (ALiBi)": attention.alibi,
        "clips queries, keys and values": attention.clip is not None,
        "does more with positions than to rotate by them": _grows(attention),
        "has norms with weights of their own for each head": any(len(norm.shape) != 1 for norm in attention.norms),
    }
    return next((what for what, is_so in special.items() if is_so), None)


def _grows(attention: Attention) -> bool:
    """Return True if queries grow with position within the context."""
    rotary, temperature = attention.rotary, attention.temperature
    return temperature is not None and (rotary is None or rotary.max_positions > temperature.original_max_positions)


def _attention_parts(attention: Attention | Strange) -> AttentionParts | None:
    """None if the half runs the model's own code."""
    if isinstance(attention, Strange) or unfit(attention) is not None:
        return None
    before = len(attention.path) + 1
    q_norm, k_norm = (
        None if norm is None else replace(norm, path=norm.path[before:])
        for norm in (attention.q_norm, attention.k_norm)
    )
    return AttentionParts(
        qkv=tuple(linear.path[before:] for linear in attention.qkv),
        out=attention.out.path[before:],
        heads=attention.heads,
        options=AttentionOptions(scale=attention.scale, softcap=attention.softcap),
        head_norms=(q_norm, k_norm) if q_norm and k_norm else None,
        rotary=attention.rotary,
    )


def _mlp_parts(part: FeedForward | Experts | Strange) -> MlpParts | None:
    """None if the half runs the model's own code."""
    if not isinstance(part, FeedForward) or (part.gated and part.activation not in ACTIVATIONS):
        return None
    before = len(part.path) + 1
    return MlpParts(
        gate_up=tuple(linear.path[before:] for linear in part.inner),
        down=part.down.path[before:],
        act=part.act[before:],
        activation=part.activation,
        gated=part.gated,
    )
