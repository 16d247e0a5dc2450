"""Parts of decoders: linear layers by role, norms, attention, feed-forward parts, experts.

Everything here is plain data. Paths start at the model's root, shapes are as in torch, nothing holds a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.model.blueprint.alibi import Alibi
from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.rotary import Rotary

Role = Literal[
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "shared_gate", "conv_in", "conv_out",
    "scan_in", "scan_out", "head",
]  # fmt: skip
NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strange:
    """Part of the model that the description cannot express, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer(Strange):
    """Part in attention's place that mixes tokens in another way: Mamba, linear attention.

    ``layer_type`` is one of `veneer.model.blueprint.masks.MAKERS`, which makes its mask.
    """

    layer_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Several(Strange):
    """Half of a block that is a sum of several parts, which only the block's own forward computes. The path is the
    block's.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent(Strange):
    """Half that a block does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Linear layer. ``transposed``: its weight is stored (in, out), as GPT-2's are; otherwise (out, in)."""

    role: Role
    path: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One linear layer of every expert, in one parameter (experts, out, in). ``bias``: the parameter (experts, out)
    of this name with ``_bias`` behind it is added. ``transposed``: it is stored (experts, in, out).
    """

    role: Role
    path: str
    shape: tuple[int, int, int]
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm over the last axes, of this ``shape``. It multiplies by its weight plus ``offset``.

    ``weight`` and ``bias`` are True if the norm has one.
    """

    path: str
    kind: NormKind
    shape: tuple[int, ...]
    eps: float
    offset: float
    weight: bool
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """Factor of rotated queries: 1 + beta · ln(1 + ⌊position / original_max_positions⌋) (Llama 4, Ministral 3)."""

    beta: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention: softmax(softcap(scale · q kᵀ) + alibi) v over the last ``window`` tokens, or all if it is
    None.

    ``qkv``: the layers of roles q, k, v, or one of role qkv that computes all three, in the layout ``heads``.
    ``q_norm`` and ``k_norm`` act before the rotation, or after it if ``norms_after_rotary``, over the axes of their
    shape. A norm of shape (head_dim,) acts on each head with one weight for all. One of (heads, head_dim) has a weight
    for each head. One of (heads · head_dim,) acts on all heads at once. ``clip``: the bound of q, k and v at the
    outputs of their layers. ``sinks``: path of a parameter with a logit for each head, which is one more term of the
    softmax's sum and has no value; or empty.
    """

    path: str
    qkv: tuple[Linear, ...]
    out: Linear
    heads: HeadLayout
    scale: float
    window: int | None = None
    softcap: float | None = None
    rotary: Rotary | None = None
    alibi: Alibi | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_after_rotary: bool = False
    clip: float | None = None
    temperature: Temperature | None = None
    sinks: str = ""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the attention."""
        return (*self.qkv, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Norms of the attention."""
        return tuple(norm for norm in (self.q_norm, self.k_norm) if norm is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv:
    """Short convolution in attention's place: ``out(c · conv(b · x))``, where ``inner`` computes b, then c, then x.

    ``conv`` is the path of a causal convolution over the last ``kernel`` tokens, with a kernel of its own for each
    channel. ``bias``: whether the convolution has a bias.
    """

    path: str
    inner: Linear
    conv: str
    kernel: int
    bias: bool
    out: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the part."""
        return (self.inner, self.out)

    @property
    def width(self) -> int:
        """Number of channels of the convolution."""
        return self.out.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNet:
    """Gated delta rule in attention's place (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464).

    ``inner`` computes queries, keys, values, a gate z for each value, and b and a for each of ``n_v_heads`` heads.
    Queries, keys and values go through ``conv``, a causal convolution over ``kernel`` tokens with a kernel of its own
    for each channel, and SiLU. Queries and keys are scaled to length 1. A head's state is multiplied by
    exp(-exp(A_log) softplus(a + dt_bias)), and β is ``beta_scale`` · sigmoid(b). The heads' outputs go through
    ``norm``, are multiplied by SiLU(z) and read by ``out``. ``by_head``: ``inner`` is two layers, whose outputs are
    those of one key head after the other: query, key, values, gates; b, a. Otherwise its last three layers compute z, b
    and a.
    """

    path: str
    inner: tuple[Linear, ...]
    by_head: bool
    n_k_heads: int
    n_v_heads: int
    k_width: int
    v_width: int
    conv: str
    kernel: int
    bias: bool
    beta_scale: float
    norm: Norm
    out: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the part."""
        return (*self.inner, self.out)

    @property
    def width(self) -> int:
        """Number of values of all heads."""
        return self.n_v_heads * self.v_width


KeepsState = ShortConv | DeltaNet
"""Parts in attention's place that keep a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """Feed-forward part: ``down(activation(gate x) · up x)`` with a gate, and ``down(activation(up x))`` without.

    ``inner``: the layers of roles gate and up, or one of role gate_up that computes gate, then up, or up alone.
    ``activation`` is one of `veneer.ops.activation.KINDS`, ``act`` the path of the module that computes it. ``path`` is
    the block's own if the block itself holds the layers (OPT).
    """

    path: str
    inner: tuple[Linear, ...]
    down: Linear
    activation: str
    act: str

    @property
    def gated(self) -> bool:
        """Return True if one half of the output of ``inner`` is a gate."""
        return self.inner[0].role != "up"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the feed-forward part."""
        return (*self.inner, self.down)

    @property
    def width(self) -> int:
        """Number of input features of ``down``."""
        return self.down.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Weighted sum of the ``top_k`` gated feed-forward parts with the highest values of a router. ``activation`` is one
    of `veneer.ops.activation.KINDS` or ``swiglu_oai`` (`veneer.ops.glu.UNITS`).

    The values are the softmax of its scores, or the sigmoid of each. ``normalized``: those of the chosen ones are
    divided by their sum. ``n_groups``, ``kept_groups`` and ``scale`` are as in `veneer.ops.experts.Router`.
    ``correction``: path of a buffer that is added to the values by which experts are chosen, or empty.
    ``wide_scores``: the scores are computed in float32. ``shared`` also runs on every token, times the sigmoid of
    ``shared_gate`` if there is one.
    """

    path: str
    router: Linear
    n_experts: int
    top_k: int
    normalized: bool
    gate_up: Stack
    down: Stack
    activation: str
    values: Literal["softmax", "sigmoid"] = "softmax"
    n_groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    correction: str = ""
    wide_scores: bool = False
    shared: FeedForward | None = None
    shared_gate: Linear | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of the experts except the stacks."""
        gate = () if self.shared_gate is None else (self.shared_gate,)
        return (self.router, *gate, *(self.shared.linears if self.shared else ()))

    @property
    def width(self) -> int:
        """Number of input features of one expert's ``down``."""
        return self.down.shape[2]
