"""Places in a frozen model that a method can change, described by shapes; no module is held."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from veneer.records.frozen import FrozenWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """Linear map ``y = W x + c``, ``W (out_features, in_features)``.

    ``kind`` is the form of the input: ``"linear"`` takes vectors, ``"embedding"`` token ids, ``"convolution"`` patches
    of ``window`` positions. For an embedding in_features is the size of the vocabulary, for a convolution channels
    times positions. In ``groups`` of channels, the outputs of a group depend on that group's inputs alone: W is zero
    elsewhere.
    ``weight`` and ``bias`` are None in planning, before anything is loaded; ``has_bias`` is known then too.
    ``experts`` such maps may be stacked in one tensor (experts, o, i). The record then has that dimension as the first
    of ``a`` and ``b``, and ``weight`` is None.
    ``repeats``: how often a low-rank update is added (twice by PEFT at the output projection of torch's attention).
    ``row_sq`` returns the squared norms of the rows of the weight. The holder of the site computes them once.
    ``found`` caches values that methods derive from the weight, each by a key of its own. A method drops its entry when
    it derives its factors. The holder of the site keeps the cache, and empties it if the weight changes.
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
    has_bias: bool = False
    found: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.bias is not None:
            object.__setattr__(self, "has_bias", True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualSite:
    """Output of one sub-layer of one block, width ``features``, before its residual add."""

    name: str
    layer: int
    sublayer: Literal["attention", "cross_attention", "mlp"]
    features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """Key/value heads of one attention layer.

    ``cross``: the layer has a cross-attention layer in its block, in the decoder of an encoder-decoder.
    """

    name: str
    layer: int
    kv_heads: int
    head_dim: int
    cross: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendingSite:
    """One attention layer, whose projections read vectors of width ``features``."""

    name: str
    layer: int
    features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSite:
    """Input embeddings of the model, width ``features``, for a vocabulary of that many tokens.

    ``embed`` looks token ids up (None in planning). ``text_ids`` are the tokens of the text that a method starts from.
    ``layers`` and ``heads`` count those of the model, if it gives them.
    """

    name: str
    features: int
    vocabulary: int = 0
    embed: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d"]] | None = None
    text_ids: tuple[int, ...] = ()
    layers: int | None = None
    heads: int | None = None


Site = LinearSite | ResidualSite | AttendingSite | InputSite | tuple[AttentionSite, ...]
"""Any of them; a prefix has all attention layers at once."""
