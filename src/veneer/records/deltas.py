"""The five kinds of records that methods lower to. The rest of the program knows only these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import CompositionError
from veneer.records.terms.change import Change
from veneer.records.terms.pair import Pair, joined
from veneer.records.terms.rotation import Rotation
from veneer.records.terms.scale import Scale

Around = Scale | Rotation
"""A term in front of a layer or behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDelta:
    """Change to a linear layer ``y = W x + c`` with ``W (o, i)``, made of terms:

    ``y = output((W + Σ adds) input(x)) + bias``

    ``adds`` are changes of the weight: at most one low-rank pair, which comes first (several pairs are joined to one),
    then other changes. ``input`` and ``output`` map features; None is the identity. ``bias`` *replaces* the layer's
    own bias; None keeps it. So methods that scale the bias (IA3) or add to it (``lora_bias``) put the result here.

    An embedding is the linear layer ``(d, n_tokens)`` applied to one-hot rows. A convolution is a linear layer applied
    to patches. Experts stacked in one tensor may have only a stacked pair.
    """

    adds: tuple[Pair | Change, ...] = ()
    input: Around | None = None
    output: Around | None = None
    bias: Float[Tensor, " o"] | None = None

    def __post_init__(self) -> None:
        pairs = [term for term in self.adds if isinstance(term, Pair)]
        if len(pairs) > 1 or (pairs and self.adds[0] is not pairs[0]):
            others = (term for term in self.adds if not isinstance(term, Pair))
            object.__setattr__(self, "adds", (joined(pairs), *others))

    @classmethod
    def pair(cls, a: Tensor, b: Tensor, scale: float = 1.0, **vectors: Tensor | None) -> LinearDelta:
        """Return the record of one low-rank pair; ``vectors`` are its ``core`` and ``b_scale``."""
        return cls(adds=(Pair(a=a, b=b, scale=scale, **vectors),))

    @property
    def low_rank(self) -> Pair | None:
        """Low-rank pair; None if there is none."""
        first = self.adds[0] if self.adds else None
        return first if isinstance(first, Pair) else None

    @property
    def changes(self) -> tuple[Change, ...]:
        """Changes of the weight other than the pair."""
        return tuple(term for term in self.adds if not isinstance(term, Pair))

    @property
    def rank(self) -> int:
        """Rank of the pair; 0 if there is none."""
        pair = self.low_rank
        return 0 if pair is None else pair.rank

    @property
    def only_adds(self) -> bool:
        """Return True if the record adds to the weight and maps no inputs or outputs: such records can be summed."""
        return self.input is None and self.output is None

    @property
    def only_scales(self) -> bool:
        """Return True if nothing is added to the weight, and inputs and outputs are scaled or unchanged."""
        return not self.adds and not any(isinstance(term, Rotation) for term in (self.input, self.output))

    @property
    def is_low_rank(self) -> bool:
        """Return True if a low-rank pair is the only change of the weight."""
        return self.only_adds and len(self.adds) == 1 and self.low_rank is not None

    @property
    def is_elementary(self) -> bool:
        """Return True if all terms are pairs, scales or a bias, which the kernels support."""
        return not self.changes and not any(isinstance(term, Rotation) for term in (self.input, self.output))

    @property
    def changes_nothing(self) -> bool:
        """Return True if there is no term."""
        return not self.adds and self.only_adds and self.bias is None

    @property
    def input_scale(self) -> Float[Tensor, " i"] | None:
        """Scale of the inputs; None if there is none. A rotation has no scale: see `is_elementary`."""
        return self.input.vector if isinstance(self.input, Scale) else None

    @property
    def output_scale(self) -> Float[Tensor, " o"] | None:
        """Scale of the outputs; None if there is none. A rotation has no scale: see `is_elementary`."""
        return self.output.vector if isinstance(self.output, Scale) else None

    @property
    def terms(self) -> tuple[Pair | Change | Around, ...]:
        """Terms in the order of their tensors."""
        return (*self.adds, *(term for term in (self.input, self.output) if term is not None))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of all terms, then the bias."""
        own = tuple(tensor for term in self.terms for tensor in term.tensors)
        return own if self.bias is None else (*own, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def factors(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, "*experts r i"], Float[Tensor, "*experts o r"]]:
        """Return A, and B multiplied by the pair's ``scale``, ``core`` and ``b_scale``, computed in ``dtype``.

        Raises CompositionError unless the record `is_low_rank`.
        """
        pair = self.low_rank
        if pair is None or not self.is_low_rank:
            raise CompositionError(
                f"a record with {self.told} has no factors: only a low-rank pair alone has some. Use added(), which "
                "gives the whole change"
            )
        pair = pair if dtype is None else pair.with_tensors([tensor.to(dtype) for tensor in pair.tensors])
        return pair.a, pair.plain_b * pair.scale

    def added(self) -> Float[Tensor, "o i"]:
        """Return the sum of the changes of the weight, as a matrix in at least float32.

        Raises CompositionError if there are none.
        """
        if not self.adds:
            raise CompositionError(
                "the record changes no weight, only a bias: there is nothing to combine. Leave it out"
            )
        wide = torch.promote_types(self.adds[0].tensors[0].dtype, torch.float32)
        return sum((term.dense(wide) for term in self.adds[1:]), self.adds[0].dense(wide))

    @property
    def told(self) -> str:
        """Description of the record's parts, for messages."""
        parts = [
            "a low-rank pair" * (self.low_rank is not None),
            "a change of the whole weight" * bool(self.changes),
            *(
                f"{'a scale' if isinstance(term, Scale) else 'a rotation'} of its {side}s"
                for side, term in (("input", self.input), ("output", self.output))
                if term is not None
            ),
            "a bias" * (self.bias is not None),
        ]
        return " and ".join(filter(None, parts)) or "no term"

    def without_pair(self) -> LinearDelta:
        """Return the record without its pair."""
        return self if self.low_rank is None else replace(self, adds=self.changes)

    def weighed(self, weight: float, own_bias: Float[Tensor, " o"] | None = None) -> LinearDelta:
        """Return the record whose change of the layer is ``weight`` times this one's; ``own_bias`` is the layer's bias.

        Raises CompositionError if inputs or outputs are mapped: such a change cannot be multiplied.
        """
        if not self.only_adds:
            raise CompositionError(
                f"a record with {self.told} cannot be weighed: only changes that are added to a layer can be. Give it "
                "the weight 1"
            )
        bias = self.bias
        if bias is not None:
            bias = weight * bias if own_bias is None else own_bias + weight * (bias - own_bias)
        return replace(self.with_adds_times(weight), bias=bias)

    def with_adds_times(self, weight: float) -> LinearDelta:
        """Return the record with its ``adds`` multiplied by ``weight``."""
        return replace(self, adds=tuple(term.weighed(weight) for term in self.adds))

    def transposed(self) -> LinearDelta:
        """Return the same change for the transposed weight (i, o), without bias."""
        return LinearDelta(
            adds=tuple(term.transposed() for term in self.adds),
            input=None if self.output is None else self.output.transposed(),
            output=None if self.input is None else self.input.transposed(),
        )

    def of_expert(self, expert: int) -> LinearDelta:
        """Return the record of one of the stacked experts. Raises CompositionError for terms other than pairs."""
        pair = self.low_rank
        if not self.without_pair().changes_nothing:
            raise CompositionError(
                f"a record with {self.told} cannot be split by expert: stacked experts take low-rank pairs alone"
            )
        return self if pair is None else LinearDelta(adds=(pair.of_expert(expert),))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualDelta:
    """Bottleneck: ``h + scale * (up act(down x + down_bias) + up_bias)``.

    ``where`` chooses ``x`` and ``h``. ``"serial"`` reads and changes the output of a sub-layer before its residual add
    (x = h). ``"parallel"`` reads the sub-layer's input and changes its output.
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
    """Key/value pairs of n virtual tokens before the sequence, in one attention layer.

    The keys are already rotated.
    """

    k: Float[Tensor, "n kv_heads head_dim"]
    v: Float[Tensor, "n kv_heads head_dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedDelta:
    """n embeddings that one attention layer attends to, with a softmax apart from the sequence's.

    ``gate`` times the result is added to the layer's own attention. The layer's projections compute the embeddings'
    keys and values, without positions.
    """

    prompt: Float[Tensor, "n d"]
    gate: Float[Tensor, " 1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDelta:
    """Embeddings of n virtual tokens before the input."""

    embeddings: Float[Tensor, "n d"]
