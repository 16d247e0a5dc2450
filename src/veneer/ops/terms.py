"""Linear maps that adapters apply to each row, besides low-rank pairs and scales, packed for serving.

A row's result does not depend on the other rows. Products and sums are in float32, and a result is rounded once to the
rows' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.packed import BLOCK, DEPTH_UNIT, PackedWeight, packed_depth
from veneer.records.deltas import LinearDelta
from veneer.records.terms.form import Form
from veneer.records.terms.rotation import Rotation

TERM_KINDS = ("blocks", "sparse", "kronecker", "circulant", "hadamard")
"""In the order of csrc/terms."""
PADDING = 16
"""Rows of values are padded with zeros to a multiple of this."""


@dataclass(frozen=True, slots=True)
class PackedTerm:
    """Linear map of rows in the kernels' layout: float32 values padded as csrc/terms/terms.h documents, and int32
    indices.
    """

    kind: str
    sizes: tuple[int, ...]
    values: Tensor
    index: Tensor | None = None

    @classmethod
    def pack(cls, form: Form) -> PackedTerm:
        """Return a `Form` packed for the kernels."""
        values, index = _PACKED[form.kind](form)
        return cls(form.kind, form.sizes, values.contiguous(), index)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""
        sizes = self.sizes
        if self.kind == "blocks":
            return sizes[0] * sizes[1], sizes[0] * sizes[1]
        if self.kind in ("sparse", "hadamard"):
            return sizes[0], sizes[1]
        if self.kind == "kronecker":
            return sizes[0] * sizes[2], sizes[1] * sizes[3]
        return sizes[0] * sizes[2], sizes[1] * sizes[2]

    @property
    def is_sound(self) -> bool:
        """Return True if its sizes and indices keep the kernels within its memory.

        A term may come from a damaged file.
        """
        if self.kind not in _N_SIZES or len(self.sizes) != _N_SIZES[self.kind] or min(self.sizes) < 1:
            return False
        if self.values.dtype != torch.float32 or not self.values.is_contiguous():
            return False
        if self.kind == "sparse":
            if self.index is None or self.index.dtype != torch.int32 or self.values.ndim != 1 or self.index.ndim != 1:
                return False
            return self.index.is_contiguous() and _is_within(self.index, len(self.values), *self.sizes)
        return self.index is None and self.values.numel() == _LENGTHS[self.kind](*self.sizes)


@dataclass(frozen=True, slots=True)
class LayerTerms:
    """Packed linear maps of one adapter at one layer: of its inputs, of its outputs, and those added to its weight."""

    input: PackedTerm | None = None
    output: PackedTerm | None = None
    adds: tuple[PackedTerm, ...] = ()

    def fits(self, o: int, i: int) -> bool:
        """Return True if all maps are sound and have the sizes of a layer (o, i)."""
        maps = [(term, (n, n)) for term, n in ((self.input, i), (self.output, o)) if term is not None]
        in_place = all(term.kind == "blocks" for term, _ in maps) and all(term.kind != "blocks" for term in self.adds)
        return in_place and all(
            term.is_sound and term.shape == shape for term, shape in [*maps, *((term, (o, i)) for term in self.adds)]
        )

    @classmethod
    def taken(cls, record: LinearDelta, *, reads_weight: bool) -> tuple[LayerTerms | None, LinearDelta]:
        """Split an adapter's record of one layer: return its packed terms (None if it has none), and the rest of the
        record. ``reads_weight``: also pack terms that read the layer's weight.
        """
        input_term, output_term = _map_of(record.input), _map_of(record.output)
        found = ((term, term.form()) for term in record.changes)
        forms = [
            (term, None if form is None or (form.kind == "hadamard" and not reads_weight) else form)
            for term, form in found
        ]
        adds = tuple(PackedTerm.pack(form) for _, form in forms if form is not None)
        if input_term is None and output_term is None and not adds:
            return None, record
        pair = () if record.low_rank is None else (record.low_rank,)
        left = replace(
            record,
            adds=(*pair, *(term for term, form in forms if form is None)),
            input=None if input_term is not None else record.input,
            output=None if output_term is not None else record.output,
        )
        return cls(input_term, output_term, adds), left


def apply_term(
    term: PackedTerm, x: Float[Tensor, "n i"], out: Float[Tensor, "n o"], *, add: bool, backend: str | None = None
) -> None:
    """Write ``M x``, with M the term's matrix, into ``out``, or add it to ``out`` if ``add``. If the term is
    block-diagonal, out may be x.

    Raises ShapeError if something does not fit.
    """
    if x.shape != (len(out), term.shape[1]) or out.shape[1] != term.shape[0] or x.dtype != out.dtype:
        raise ShapeError(
            f"a term of shape {term.shape} maps rows of {term.shape[1]} values to rows of {term.shape[0]} in the same "
            f"dtype; given {tuple(x.shape)} {x.dtype} and {tuple(out.shape)} {out.dtype}"
        )
    if len(x):
        implementation("terms.apply", x.device, backend)(term, x, out, add)


def times_weight(term: PackedTerm, weight: PackedWeight, *, backend: str | None = None) -> PackedWeight:
    """Return ``W ⊙ (B A)`` of a hadamard term, rounded to W's dtype. Raises ShapeError if W is of another shape."""
    if term.kind != "hadamard" or term.shape != weight.shape:
        raise ShapeError(
            f"a hadamard term multiplies a weight of its own shape; given a {term.kind} term of {term.shape} and a "
            f"weight of {weight.shape}"
        )
    panels: Tensor = implementation("terms.make", weight.panels.device, backend)(term, weight)
    return PackedWeight(panels, weight.shape)


def _map_of(term: object) -> PackedTerm | None:
    form = term.form() if isinstance(term, Rotation) else None
    return None if form is None else PackedTerm.pack(form)


def _padded(x: Tensor) -> Tensor:
    """Return x in float32, with zeros appended to the last axis up to a multiple of `PADDING`."""
    x = x.detach().to(torch.float32)
    return functional.pad(x, (0, -x.shape[-1] % PADDING))


def _blocks(form: Form) -> tuple[Tensor, None]:
    return _padded(form.values.mT), None


def _sparse(form: Form) -> tuple[Tensor, Tensor]:
    o, i = form.sizes
    if form.places is None:
        raise ShapeError("a sparse form needs places, an index for each value; given none")
    places, order = form.places.detach().sort()
    starts = torch.searchsorted(places, torch.arange(0, (o + 1) * i, i, device=places.device))
    return form.values.detach()[order].float(), torch.cat([starts, places % i]).to(torch.int32)


def _kronecker(form: Form) -> tuple[Tensor, None]:
    if form.second is None:
        raise ShapeError("a Kronecker product has two factors; given one")
    return torch.cat([_padded(form.values.reshape(-1)), _padded(form.second.T).reshape(-1)]), None


def _circulant(form: Form) -> tuple[Tensor, None]:
    b = form.sizes[2]
    backwards = -torch.arange(2 * b, device=form.values.device) % b
    return functional.pad(_padded(form.values[..., backwards]), (0, PADDING)), None  # a register may begin at any place


def _hadamard(form: Form) -> tuple[Tensor, None]:
    if form.second is None:
        raise ShapeError("a Hadamard product has two factors; given one")
    a = functional.pad(form.values.detach().float(), (0, -form.sizes[1] % DEPTH_UNIT))
    b = functional.pad(form.second.detach().float(), (0, 0, 0, -form.sizes[0] % BLOCK))
    return torch.cat([a.reshape(-1), b.view(-1, BLOCK, b.shape[1]).mT.reshape(-1)]), None


_PACKED: dict[str, Callable[[Form], tuple[Tensor, Tensor | None]]] = {
    "blocks": _blocks,
    "sparse": _sparse,
    "kronecker": _kronecker,
    "circulant": _circulant,
    "hadamard": _hadamard,
}


def _is_within(index: Tensor, n_values: int, o: int, i: int) -> bool:
    """Return True if the ``index`` of a sparse matrix (o, i) is valid: o + 1 row starts that rise from 0 to
    ``n_values``, then ``n_values`` columns below i.
    """
    if len(index) != o + 1 + n_values:
        return False
    starts, columns = index[: o + 1], index[o + 1 :]
    rising = int(starts[0]) == 0 and int(starts[-1]) == n_values and bool((starts.diff() >= 0).all())
    return rising and bool(((columns >= 0) & (columns < i)).all())


def _up(n: int) -> int:
    return n + -n % PADDING


_LENGTHS: dict[str, Callable[..., int]] = {
    "blocks": lambda k, b: k * b * _up(b),
    "kronecker": lambda o1, i1, o2, i2: _up(o1 * i1) + i2 * _up(o2),
    "circulant": lambda m, n, b: m * n * (_up(2 * b) + PADDING),
    "hadamard": lambda o, i, r: r * (packed_depth(i, torch.bfloat16) + _up(o)),
}
_N_SIZES = {"blocks": 2, "sparse": 2, "kronecker": 4, "circulant": 3, "hadamard": 3}
