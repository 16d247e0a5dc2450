"""The four records that every method lowers to. The rest of the program knows only these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDelta:
    """A change to a linear layer ``y = W x + c`` with ``W (o, i)``:

    ``y = out_scale * (W (in_scale * x) + scale * b_scale * B (core * A (in_scale * x))) + bias``

    A field that is None is neutral: no low-rank part, scales of one, and the layer's own ``c`` as bias. ``core`` and
    ``b_scale``, vectors between A and B and behind B, let layers share one A and B (VeRA).
    ``bias`` *replaces* the layer's own, so IA3 scales it and ``lora_bias`` adds to it before the record is made.
    An embedding is the linear layer ``(d, n_tokens)`` applied to one-hot rows; a convolution is one applied to patches.
    Experts stacked in one tensor have one ``a`` and ``b`` each, stacked likewise; then there is nothing but a low-rank
    part.
    """

    a: Float[Tensor, "*experts r i"] | None = None
    b: Float[Tensor, "*experts o r"] | None = None
    scale: float = 1.0
    core: Float[Tensor, " r"] | None = None
    b_scale: Float[Tensor, " o"] | None = None
    in_scale: Float[Tensor, " i"] | None = None
    out_scale: Float[Tensor, " o"] | None = None
    bias: Float[Tensor, " o"] | None = None

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 where there is none."""
        return 0 if self.a is None else self.a.shape[-2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualDelta:
    """A bottleneck: ``h + scale * (up act(down x + down_bias) + up_bias)``.

    ``where`` says what ``x`` and ``h`` are: ``"serial"`` reads and changes the output of a sub-layer before its
    residual add (x = h); ``"parallel"`` reads the sub-layer's input and changes its output.
    """

    down: Float[Tensor, "r d"]
    up: Float[Tensor, "d r"]
    down_bias: Float[Tensor, " r"] | None = None
    up_bias: Float[Tensor, " d"] | None = None
    activation: str = "relu"
    scale: float = 1.0
    where: Literal["serial", "parallel"] = "serial"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixDelta:
    """n virtual key/value pairs in front of the sequence of one attention layer. Keys count as already rotated."""

    k: Float[Tensor, "n kv_heads head_dim"]
    v: Float[Tensor, "n kv_heads head_dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDelta:
    """n virtual token embeddings in front of the input."""

    embeddings: Float[Tensor, "n d"]


Record = LinearDelta | ResidualDelta | PrefixDelta | PromptDelta
