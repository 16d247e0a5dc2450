"""Low-rank adapters and bottlenecks of many versions in one batch, for serving: packed once, each at its own rank.

``y[n] += scale_k B_k A_k x[n]`` for the rows of version k; a `FactorPair` may have more terms between the products.
This is the product of a mixed batch (SGMV, Chen et al. 2023, arXiv 2310.18547). In training the factors change with
each step, so `veneer.ops.grouped_low_rank` packs them on every call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.activation import KINDS
from veneer.ops.dispatch import implementation
from veneer.ops.memory import address
from veneer.ops.packed import BLOCK, FLOATS

DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = (*KINDS, "tanh", "sigmoid", "leaky_relu", "identity")


class FactorPair(NamedTuple):
    """Pair of factors, ``b_scale * scale * b @ act(core * (a @ x) + a_bias) + b_bias`` with a (r, i) and b (o, r).

    ``core`` and ``b_scale`` are VeRA's vectors. ``a_bias``, ``b_bias`` and ``activation`` (one of `ACTIVATIONS`) belong
    to a bottleneck.
    """

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    scale: float
    core: Float[Tensor, " r"] | None = None
    b_scale: Float[Tensor, " o"] | None = None
    a_bias: Float[Tensor, " r"] | None = None
    b_bias: Float[Tensor, " o"] | None = None
    activation: str = "identity"

    @property
    def is_plain(self) -> bool:
        """Return True if the pair is two products and nothing else."""
        vectors = (self.core, self.b_scale, self.a_bias, self.b_bias)
        return self.activation == "identity" and all(vector is None for vector in vectors)


class Middle(NamedTuple):
    """Vectors that act between and after the two products of a version's pairs, in float32, joined over the layers.

    ``core`` and ``bias`` act between the products and have as many values for a layer as its packed rank. ``out_scale``
    and ``out_bias`` act after the second product. If ``scales_y``, ``out_scale`` also multiplies the output to which
    the pair is added.
    """

    core: Float[Tensor, " ranks"] | None
    bias: Float[Tensor, " ranks"] | None
    activation: str
    out_scale: Float[Tensor, " outputs"] | None
    out_bias: Float[Tensor, " outputs"] | None
    scales_y: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers for the kernels: addresses, and the activation's index."""
        places = [0 if v is None else address(v, v.device.type) for v in (*self[:2], *self[3:5])]
        return (*places[:2], ACTIVATIONS.index(self.activation), *places[2:])


def filled(n: int, dtype: torch.dtype) -> int:
    """Return the packed size of a rank or of a's inputs: in bfloat16 zero-padded to an even number."""
    return n + n % 2 if dtype == torch.bfloat16 else n


@dataclass(frozen=True, slots=True, eq=False)
class PackedPairs:
    """Low-rank pairs of one adapter version at layers that share their input, in the dtype of their products.

    ``factors`` is flat: the a of all layers stacked, then ``scale * b`` of each layer, each in the panels of
    `veneer.ops.packed`. A layer of rank 0 has no pair. If ``shares_a``, all layers read one a, which is stored once.
    Pairs of a layer of ``n_experts`` experts have the factors of one expert after another (`PairsPacker.add_experts`).
    """

    factors: Tensor
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    shares_a: bool = False
    middle: Middle | None = None
    n_experts: int = 1

    @classmethod
    def pack(
        cls,
        pairs: Sequence[FactorPair | None],
        out_features: Sequence[int],
        *,
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> PackedPairs:
        """Return the packed pairs of a version: for each layer one pair, or None if the version has none there.

        ``scale * b`` is rounded once, to ``dtype``. If the pairs of all layers have the same a, in the same memory, it
        is packed and multiplied once. Raises the errors of `PairsPacker.add`.
        """
        packer = PairsPacker(backend)
        packed = packer.add(pairs, out_features, dtype)
        packer.run()
        return packed

    def with_vectors(self, pairs: Sequence[FactorPair | None]) -> PackedPairs:
        """Return a copy with the vectors of ``pairs`` (core, biases, ``b_scale``), if they have any. The factors are
        shared, not copied.
        """
        return replace(self, middle=_middle(pairs, self.out_features, self.dtype) or self.middle)

    def scaling(self, scales: Sequence[Tensor | None]) -> PackedPairs | None:
        """Return a copy that computes ``y = scale * (y + B A x)``. ``scales`` has one (o,) for each layer, or None for
        a scale of 1.

        Return None if all scales are None, or if the pairs have vectors after their products.
        """
        middle = self.middle or Middle(None, None, "identity", None, None)
        scale = _joined(scales, self.out_features, 1.0)
        if scale is None or middle.out_scale is not None or middle.out_bias is not None:
            return None
        return replace(self, middle=middle._replace(out_scale=scale, scales_y=True))

    def expert(self, number: int) -> PackedPairs:
        """Return the pair of one expert, which shares memory with those of all."""
        n = len(self.factors) // self.n_experts
        return replace(self, factors=self.factors[number * n : (number + 1) * n], n_experts=1)

    @property
    def scales_y(self) -> bool:
        """Return True if the outputs to which the pairs are added are scaled too."""
        return self.middle is not None and self.middle.scales_y

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers for the kernels that describe the vectors between and after the products."""
        if self.middle is None:
            return (0,) * 6
        return (1 | 2 * self.shares_a | 4 * self.middle.scales_y, *self.middle.numbers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.factors.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, with their padding."""
        return self.factors.nbytes


class Factor(NamedTuple):
    """A factor to write: rows (n, i), times ``scale``, go into a matrix (o, depth) in panels, from row ``first`` on."""

    rows: Tensor
    scale: float
    panels: Tensor
    o: int
    depth: int
    first: int


class PairsPacker:
    """Packer of a version's pairs: `add` collects them for each group of layers, then one call of `run` packs all."""

    def __init__(self, backend: str | None = None) -> None:
        self._backend = backend
        self._factors: list[Factor] = []

    def add(self, pairs: Sequence[FactorPair | None], out_features: Sequence[int], dtype: torch.dtype) -> PackedPairs:
        """Return pairs as `PackedPairs.pack` does; their factors stay unwritten until `run`.

        Raises ShapeError if pairs and layers do not fit, or if there is no pair at all. Raises ConfigError for an
        unknown activation, and for layers with different activations.
        """
        _check_pairs(pairs, out_features, dtype)
        ranks = tuple(0 if pair is None else pair.a.shape[0] for pair in pairs)
        present = [pair for pair, rank in zip(pairs, ranks, strict=True) if pair is not None and rank]
        like = next(pair.a for pair in pairs if pair is not None)
        shared = len(present) == len(pairs) > 1 and len({_place(pair.a) for pair in present}) == 1
        above = present[:1] if shared else present
        in_rows = [filled(pair.a.shape[0], dtype) for pair in above]
        shapes = [(sum(in_rows), like.shape[1]), *(pair.b.shape for pair in present)]
        factors, (a, *bs) = _room(shapes, dtype, like.device)
        first = 0
        for pair, rows in zip(above, in_rows, strict=True):
            self._put(_one_of(FLOATS, pair.a, dtype), 1.0, a, shapes[0][0], first)
            first += rows
        for pair, b in zip(present, bs, strict=True):
            self._put(_one_of(FLOATS, pair.b, torch.float32), pair.scale, b, pair.b.shape[0], 0)
        middle = _middle(pairs, out_features, dtype)
        if shared and middle is None:
            middle = Middle(None, None, "identity", None, None)
        return PackedPairs(factors, like.shape[1], tuple(out_features), ranks, shared, middle)

    def add_experts(
        self, a: Float[Tensor, "experts r i"], b: Float[Tensor, "experts o r"], scale: float, dtype: torch.dtype
    ) -> PackedPairs:
        """Return the packed pairs ``scale * b @ a`` of each expert of a layer, one expert's factors after another's.

        The factors stay unwritten until `run`. Raises ShapeError if a and b do not fit, or for no experts or a rank of
        0.
        """
        (n, r, i), o = a.shape, b.shape[1]
        if not n or not r or b.shape != (n, o, r) or dtype not in DTYPES:
            raise ShapeError(
                f"pairs of experts are a (experts, r, i) and b (experts, o, r), packed in float32 or bfloat16; given "
                f"{tuple(a.shape)} and {tuple(b.shape)}, and {dtype}"
            )
        above = filled(r, dtype)
        factors, rooms = _room([(above, i), (o, r)] * n, dtype, a.device)
        a, b = _one_of(FLOATS, a, dtype), _one_of(FLOATS, b, torch.float32).contiguous()
        for expert in range(n):
            self._put(a[expert], 1.0, rooms[2 * expert], above, 0)
            self._put(b[expert], scale, rooms[2 * expert + 1], o, 0)
        return PackedPairs(factors, i, (o,), (r,), n_experts=n)

    def run(self) -> list[Factor]:
        """Write the factors of all added pairs, and return them."""
        factors, self._factors = self._factors, []
        pack_factors(factors, backend=self._backend)
        return factors

    def _put(self, rows: Tensor, scale: float, panels: Tensor, o: int, first: int) -> None:
        self._factors.append(Factor(rows, scale, panels, o, filled(rows.shape[1], panels.dtype), first))


def pack_factors(factors: Sequence[Factor], *, backend: str | None = None) -> None:
    """Multiply factors by their scales, round them, and write them into their panels."""
    if factors:
        implementation("pairs.pack", factors[0].panels.device, backend)(factors)


class Segment(NamedTuple):
    """Rows from ``start`` up to ``stop`` of a step, to which one adapter version applies."""

    pairs: PackedPairs
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Segments of a step at layers that share their input, checked once for all steps with these rows.

    ``table (n_segments, 9 + n_layers)`` holds for each segment: address of the factors, start, stop,
    `PackedPairs.numbers`, ranks.
    """

    parts: tuple[Segment, ...]
    table: Int64[Tensor, "n_segments numbers"]
    n_rows: int

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Segments:
        """Return the segments of one step. Raises ShapeError for none, and for pairs of different layers or dtypes."""
        parts = tuple(segments)
        kinds = {(s.pairs.in_features, s.pairs.out_features, s.pairs.dtype) for s in parts}
        if len(kinds) != 1 or not all(0 <= s.start <= s.stop for s in parts):
            raise ShapeError(
                "segments must be at least one, of pairs of one shape and dtype, and none may end before it starts; "
                f"given inputs, outputs and dtypes {sorted(kinds, key=str)}, rows {[(s.start, s.stop) for s in parts]}"
            )
        numbers = [
            (address(p.factors, p.factors.device.type), start, stop, *p.numbers, *p.ranks) for p, start, stop in parts
        ]
        return cls(parts, torch.tensor(numbers), max(s.stop for s in parts))

    @property
    def pairs(self) -> PackedPairs:
        """Pairs of the first segment, whose layers and dtype are those of all."""
        return self.parts[0].pairs


def add_pairs(
    x: Float[Tensor, "n i"],
    segments: Segments | Sequence[Segment],
    ys: Sequence[Float[Tensor, "n _"]],
    *,
    backend: str | None = None,
) -> None:
    """Add the products of the pairs with x to the outputs ``ys`` of layers that share x, in place. For inference alone.

    A row is in one segment, or in none and then unchanged. Sums are float32, rounded at the end to the dtype of ys.
    Between the products they are rounded to bfloat16 if x and the factors are bfloat16 and the CPU multiplies it. A
    row's result does not depend on the other rows, bit for bit. Only last axes must be contiguous.

    Raises ShapeError.
    """
    if not isinstance(segments, Segments):
        if not segments:
            return
        segments = Segments.of(segments)
    _check(x, segments, ys)
    implementation("pairs.add", x.device, backend)(x, segments, ys)


def _room(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Sequence[Tensor]]:
    """Allocate zeroed memory for matrices in panels; return it, and the part of it that each matrix gets."""
    sizes = [(o + -o % BLOCK) * filled(i, dtype) for o, i in shapes]
    is_filled = sum(sizes) == sum(o * i for o, i in shapes)
    room = (torch.empty if is_filled else torch.zeros)(sum(sizes), dtype=dtype, device=device)
    starts = itertools.accumulate(sizes, initial=0)
    return room, [room[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _one_of(dtypes: Sequence[torch.dtype], x: Tensor, other: torch.dtype) -> Tensor:
    """Return x detached, converted to ``other`` unless its dtype is among ``dtypes``."""
    return x.detach() if x.dtype in dtypes else x.detach().to(other)


def _place(x: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two tensors if they have the same address, shape, strides and dtype."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _middle(pairs: Sequence[FactorPair | None], out_features: Sequence[int], dtype: torch.dtype) -> Middle | None:
    """Return the vectors of all layers' pairs that act between and after the two products, joined; None if no pair has
    such vectors or an activation.
    """
    present = [pair for pair in pairs if pair is not None]
    if all(pair.is_plain for pair in present):
        return None
    ranks = [0 if pair is None else filled(len(pair.a), dtype) for pair in pairs]
    each = [pair or _NONE for pair in pairs]
    return Middle(
        _joined([pair.core for pair in each], ranks, 1.0),
        _joined([pair.a_bias for pair in each], ranks, 0.0),
        present[0].activation,
        _joined([pair.b_scale for pair in each], out_features, 1.0),
        _joined([pair.b_bias for pair in each], out_features, 0.0),
    )


def _joined(vectors: Sequence[Tensor | None], places: Sequence[int], neutral: float) -> Tensor | None:
    """Join the vectors in one tensor, each at its offset; None if there are none."""
    there = next((v for v in vectors if v is not None), None)
    if there is None:
        return None
    found = torch.full((sum(places),), neutral, dtype=torch.float32, device=there.device)
    for vector, own in zip(vectors, torch.split(found, list(places)), strict=True):
        if vector is not None:
            own[: len(vector)] = vector.detach()
    return found


_NONE = FactorPair(torch.empty(0, 0), torch.empty(0, 0), 1.0)


def _check_pairs(pairs: Sequence[FactorPair | None], out_features: Sequence[int], dtype: torch.dtype) -> None:
    given = [None if pair is None else (tuple(pair.a.shape), tuple(pair.b.shape)) for pair in pairs]
    widths = {a[1] for a, _ in filter(None, given) if len(a) == 2}
    fits = len(pairs) == len(out_features) and len(widths) == 1
    for shapes, o in zip(given, out_features, strict=False):
        fits &= shapes is None or (len(shapes[0]) == 2 and shapes[1] == (o, shapes[0][0]))
    if not fits or dtype not in DTYPES:
        raise ShapeError(
            f"packed pairs are a (r, i) and b (o, r), one pair or None a layer and one i for all, in float32 or "
            f"bfloat16; given {given} for layers of {list(out_features)} outputs, and {dtype}"
        )
    for pair in filter(None, pairs):
        o, r = pair.b.shape
        vectors = ((pair.core, r), (pair.a_bias, r), (pair.b_scale, o), (pair.b_bias, o))
        if any(vector is not None and vector.shape != (n,) for vector, n in vectors):
            raise ShapeError(
                f"core and a_bias have the rank's {r} values, b_scale and b_bias the outputs' {o}; given "
                f"{[None if vector is None else tuple(vector.shape) for vector, _ in vectors]}"
            )
    kinds = sorted({pair.activation for pair in pairs if pair is not None})
    if len(kinds) > 1 or kinds[0] not in ACTIVATIONS:
        raise ConfigError(f"packed pairs have one activation of {list(ACTIVATIONS)}; given {kinds}")


def _check(x: Tensor, segments: Segments, ys: Sequence[Tensor]) -> None:
    pairs, n = segments.pairs, x.shape[0]
    if x.ndim != 2 or x.shape[1] != pairs.in_features or x.dtype not in DTYPES or segments.n_rows > n:
        raise ShapeError(
            f"x must be (n, {pairs.in_features}) of float32 or bfloat16, n at least {segments.n_rows}; given "
            f"{tuple(x.shape)} {x.dtype}"
        )
    shapes = [(n, o) for o in pairs.out_features]
    dtype = ys[0].dtype if ys else None
    if [y.shape for y in ys] != shapes or any(y.dtype != dtype or y.stride(1) != 1 for y in ys) or dtype not in DTYPES:
        raise ShapeError(
            f"outputs must be {shapes} of one dtype, float32 or bfloat16, their last axes contiguous; given "
            f"{[(tuple(y.shape), y.dtype, y.stride()) for y in ys]}"
        )
