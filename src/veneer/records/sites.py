"""Parts of a frozen model that a method can change (sites), described by shapes, without references to modules."""

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
    of ``window`` positions. in_features is the vocabulary size for an embedding, and channels times positions for a
    convolution. With ``groups`` of channels, W is block-diagonal: a group's outputs depend only on the group's inputs.
    ``weight`` and ``bias`` are None in planning, since nothing is loaded; ``has_bias`` is set anyway. ``experts``:
    number of maps stacked in one tensor (experts, o, i). Then ``a`` and ``b`` of the record have that first dimension
    too, and ``weight`` is None. ``repeats``: number of times that a low-rank update is added (PEFT: 2 at the output
    projection of torch's attention). ``row_sq`` returns the squared norms of the rows of the weight. The holder of the
    site computes them once. ``found`` caches values that methods derive from the weight, each by a key of its own. A
    method drops its entry when it derives its factors. The holder of the site keeps the cache, and empties it if the
    weight changes.
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

    ``cross``: the layer's block also has cross-attention (decoders of encoder-decoder models).
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
    """Input embeddings of the model, of width ``features``, and the size of their vocabulary.

    ``embed`` looks token ids up; it is None in planning. ``text_ids`` are the tokens of the text that a method starts
    from. ``layers`` and ``heads`` are the model's numbers of layers and of heads, if known.
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
