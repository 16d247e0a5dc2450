"""LoKr: ``W + (alpha / r) (W₁ ⊗ W₂)``, a Kronecker product (Yeh et al. 2024, arXiv:2309.14859, section 3.2).

W₁ (o₁, i₁) is small. W₂ (o₂, i₂) is a product of two factors of rank r if that has fewer numbers, and so is W₁ on
request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.lycoris import LycorisMethod, behind_core, window_of
from veneer.inits.uniform import kaiming_uniform
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change
from veneer.records.terms.form import Form

MATRIX_UNIT = 24  # times as many multiplications it does in a second, by measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker(Change):
    """Change ``W₁ ⊗ W₂``, computed without forming the product."""

    w1: Float[Tensor, "o1 i1"]
    w2: Float[Tensor, "o2 i2"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        w1, w2 = (w if dtype is None else w.to(dtype) for w in (self.w1, self.w2))
        made: Tensor = _Made.apply(w1, w2)  # type: ignore[no-untyped-call]
        return made

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        """Return True if products with ``n_rows`` rows are faster with W₁ ⊗ W₂ as a dense matrix.

        That is so in 16 bits if a matrix unit speeds up the dense product more than the Kronecker form saves.
        """
        (o, i), o2, i1 = self.shape, len(self.w2), self.w1.shape[1]
        saved = o * i / (i * o2 + i1 * o)
        return dtype.itemsize == 2 and n_rows >= min(o, i) and saved < MATRIX_UNIT

    def matmul(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.w1.shape[1], self.w2.shape[1])
        inner = torch.nn.functional.linear(parts, self.w2)
        return (self.w1 @ inner).flatten(-2)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return Kronecker(w1=self.w1.T, w2=self.w2.T).matmul(dy)

    def form(self) -> Form:
        return Form("kronecker", (*self.w1.shape, *self.w2.shape), self.w1, self.w2)


class _Made(torch.autograd.Function):
    """Autograd function for the Kronecker product ``W₁ ⊗ W₂``. The forward pass expands both matrices to full rows and
    multiplies them entrywise.

    The gradients are matrix-vector products, unlike those of torch.kron.
    """

    @staticmethod
    def forward(ctx: Any, w1: Tensor, w2: Tensor) -> Tensor:
        ctx.save_for_backward(w1, w2)
        i1, i2 = w1.shape[1], w2.shape[1]
        wide1, wide2 = w1[:, :, None].expand(-1, -1, i2), w2[:, None].expand(-1, i1, -1)
        return (wide1.reshape(-1, 1, i1 * i2) * wide2.reshape(-1, i1 * i2)).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2 = ctx.saved_tensors
        (o1, i1), (o2, i2) = w1.shape, w2.shape
        parts = grads[0].view(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)
        return (parts @ w2.flatten()).view_as(w1), (w1.flatten() @ parts).view_as(w2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedKronecker(Change):
    """Change ``W₁ ⊗ W₂`` with W₂ (o₂, i₂, window) in PEFT's layout, in which W₁ gets a first axis of size 1.

    Its entries are those of the Kronecker product of (1, o₁, i₁) and (o₂, i₂, window), read row by row as (o, i).
    """

    w1: Float[Tensor, "o1 i1"]
    w2: Float[Tensor, "o2 i2 window"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2[0].numel()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        w1, w2 = (w if dtype is None else w.to(dtype) for w in (self.w1, self.w2))
        return torch.kron(w1[None].contiguous(), w2.contiguous()).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisMethod):
    """Settings of LoKr, with the names that PEFT gives them.

    ``decompose_factor`` is the wanted number of rows and of columns of W₁; -1 looks for widths near the square root.
    ``decompose_both``: W₁ may be a product of factors too. ``init_weights``: True starts with W₁ zero, "lycoris" with
    W₂ zero, False with both random. At a convolution the columns of W₂ are channels times positions.
    ``rank_dropout_scale``: ``rank_dropout`` divides the rows that it keeps by their share.
    """

    peft_type: ClassVar[str] = "LOKR"
    outward: ClassVar[frozenset[str]] = frozenset({"lokr_w1", "lokr_w1_a"})
    inert: ClassVar[frozenset[str]] = frozenset({"rank_dropout_scale", "decompose_both", "decompose_factor"})

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def problems(self) -> list[str]:
        found = super().problems()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            found.append(f"decompose_factor={self.decompose_factor!r} must be at least 1, or -1")
        return found

    def shapes(self, site: LinearSite) -> Shapes:
        r, n_positions = self.rank(site), math.prod(site.window)
        widths = site.out_features, site.in_features // (n_positions * site.groups)
        (o1, o2), (i1, i2) = (factors_of(n, self.decompose_factor) for n in widths)
        first: Shapes = {"lokr_w1": (o1, i1)}
        if self.decompose_both and 2 * r < max(o1, i1):
            first = _factored("lokr_w1", o1, i1, r)
        if 2 * r < max(o2, i2) and self.has_core(site):
            return first | {"lokr_t2": self.core(site), "lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2)}
        if 2 * r < max(o2, i2):
            return first | _factored("lokr_w2", o2, i2 * n_positions, r)
        return first | {"lokr_w2": (o2, i2, *site.window)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(site).items()}
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[self.init_weights]
        return {name: torch.zeros_like(value) if name in zero else value for name, value in start.items()}

    @property
    def scales_kept_rows(self) -> bool:
        return self.rank_dropout_scale

    def update(self, site: LinearSite, params: Params) -> Change:
        w1 = _whole("lokr_w1", params) * self.scale(site)
        if "lokr_t2" in params:
            rows = behind_core(params["lokr_t2"], params["lokr_w2_b"])
            return Kronecker(w1=w1, w2=params["lokr_w2_a"].T @ rows)
        w2 = _whole("lokr_w2", params)
        shifted = w2.ndim == 3  # at a convolution of one dimension
        return ShiftedKronecker(w1=w1, w2=w2) if shifted else Kronecker(w1=w1, w2=w2.flatten(1))

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        """Example layers for each form of a file: whole factors, W₂ in two, both in two (``decompose_both``), and W₂
        with a core.
        """
        plain = tuple(LinearSite(name="", in_features=n, out_features=n) for n in (1, 2 * 524287, 2**20))
        if not self.use_effective_conv2d:
            return plain
        return plain + tuple(
            replace(site, in_features=2 * site.in_features, kind="convolution", window=(2,)) for site in plain[1:]
        )

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite | None:
        if "lokr_t2" in shapes:
            return self._site_with_core(site, shapes)
        rows = (shapes.get(f"{name}_a", shapes.get(name, ())) for name in ("lokr_w1", "lokr_w2"))
        columns = (shapes.get(f"{name}_b", shapes.get(name, ())) for name in ("lokr_w1", "lokr_w2"))
        out_features, in_features = math.prod(s[0] for s in rows), math.prod(math.prod(s[1:]) for s in columns)
        site = replace(site, in_features=in_features, out_features=out_features)
        window = shapes.get("lokr_w2", ())[2:]
        if window:
            return replace(site, kind="convolution", window=window)
        # the factors of a convolution's W₂ do not tell its window
        return site if self.shapes(site) == dict(shapes) else None

    def _site_with_core(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        (o2, i2), window = (shapes[f"lokr_w2_{side}"][1] for side in "ab"), window_of(shapes["lokr_t2"])
        o1, i1 = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        return replace(site, in_features=i1 * i2 * math.prod(window), out_features=o1 * o2, window=window)


def factors_of(n: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is n: ``factor`` and its cofactor if ``factor`` divides n.

    Otherwise, return the pair of least sum whose smaller number is at most ``factor``. With -1 there is no such limit.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    smaller = max(d for d in range(1, most + 1) if n % d == 0)
    return smaller, n // smaller


def _factored(name: str, rows: int, columns: int, r: int) -> Shapes:
    return {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}


def _whole(name: str, params: Params) -> Tensor:
    return params[name] if name in params else params[f"{name}_a"] @ params[f"{name}_b"]
