"""The places in a frozen model that a method can change, described by shapes; no module is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from veneer.core.frozen import FrozenWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """A linear map ``y = W x + c``, ``W (out_features, in_features)``.

    ``kind`` tells how the input is read: ``"linear"`` takes vectors, ``"embedding"`` takes token ids (in_features is
    the size of the vocabulary), ``"convolution"`` takes patches of ``window`` positions (in_features is channels times
    positions). In ``groups`` of channels, the outputs of a group see that group's inputs alone: W is zero elsewhere.
    ``weight`` and ``bias`` are None while planning, when nothing has been loaded.
    ``experts`` such maps may lie stacked in one tensor (experts, o, i); the record then has that dimension in front of
    ``a`` and ``b``, and ``weight`` is None.
    ``repeats``: how often a low-rank update is added (twice by PEFT at the output projection of torch's attention).
    ``row_sq`` gives the squared norms of the rows of the weight; who holds the site computes them once.
    """

    name: str
    in_features: int
    out_features: int
    kind: Literal["linear", "embedding", "convolution"] = "linear"
    window: tuple[int, ...] = ()
    groups: int = 1
    weight: FrozenWeight | None = None
    bias: Float[Tensor, " o"] | None = None
    row_sq: Callable[[], Float[Tensor, " o"]] | None = None
    experts: int = 1
    repeats: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualSite:
    """The output of one sub-layer of one block, width ``features``, before its residual add."""

    name: str
    layer: int
    sublayer: Literal["attention", "cross_attention", "mlp"]
    features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """The key/value heads of one attention layer; ``cross``: it stands beside cross-attention, in the decoder of an
    encoder-decoder.
    """

    name: str
    layer: int
    kv_heads: int
    head_dim: int
    cross: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSite:
    """The input embeddings of the model, width ``features``, for a vocabulary of that many tokens.

    ``embed`` looks token ids up (None while planning); ``text_ids`` are the tokens of the text that a method starts
    from. ``layers`` and ``heads`` count those of the model, if it tells them.
    """

    name: str
    features: int
    vocabulary: int = 0
    embed: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d"]] | None = None
    text_ids: tuple[int, ...] = ()
    layers: int | None = None
    heads: int | None = None


Site = LinearSite | ResidualSite | InputSite | tuple[AttentionSite, ...]  # a prefix has all attention layers at once
