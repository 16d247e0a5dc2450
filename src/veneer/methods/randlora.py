"""RandLoRA: ``W + s Σⱼ Bⱼ Λⱼ A Γⱼ``, random A and Bⱼ shared by all layers, diagonals Λⱼ and Γⱼ trained (Albert et al.
2025, arXiv:2502.00987, eq. 4).

The sum has as many terms as full rank needs. A and Bⱼ are drawn once, from ``projection_prng_key``, for the largest
layer. A has a layer's smaller width, be it the inputs or the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.rates import no_rates
from veneer.contract.seeds import no_seeds
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Description of a random draw of A (r, 1, small) and B (large, n, r), for the largest layer, from a seed."""

    seed: int
    r: int
    small: int
    large: int
    sparsity: float | None = None

    def on(self, device: torch.device) -> tuple[Float[Tensor, "r 1 small"], Float[Tensor, "large n r"]]:
        """Return A and B as PEFT draws them on the CPU, each divided by its standard deviation.

        They are Kaiming uniform, rounded to bfloat16. With a ``sparsity`` they are -1 or 1, each with probability
        ``1 / (2 sparsity)``, and 0 otherwise.
        """
        generator = torch.Generator().manual_seed(self.seed)
        r, small, large, n = self.r, self.small, self.large, -(-self.small // self.r)
        with torch.inference_mode(False):  # they outlive the pass that asks first
            if self.sparsity is None:
                a = _kaiming((r, 1, small), generator)
                b = torch.cat([_kaiming((large, 1, r), generator) for _ in range(n)], dim=1)
            else:
                a, b = (_signs(shape, self.sparsity, generator) for shape in ((r, 1, small), (large, n, r)))
            return (a / a.std()).to(device, torch.float32), (b / b.std()).to(device, torch.float32)


class Bases:
    """A and B of a draw, on each device that has needed them. They are shared: do not write to them.

    Adapters with the same draw share the object. It is freed when the last adapter and record that use it are gone.
    """

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[Callable[[Draw], Bases], tuple[Draw]]:
        return bases, (self._draw,)

    def __repr__(self) -> str:
        return f"Bases({self._draw})"

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A and B on a device."""
        if device not in self._on:
            self._on[device] = self._draw.on(device)
        return self._on[device]


_ALIVE: WeakValueDictionary[Draw, Bases] = WeakValueDictionary()


def bases(draw: Draw) -> Bases:
    """Return the A and B of a draw, shared with other adapters if they exist already."""
    found = _ALIVE.get(draw)
    if found is None:
        found = _ALIVE[draw] = Bases(draw)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomBases(Change):
    """Change ``scale · B A'`` or its transpose. A' (n r, small) has the rows of all Λⱼ A Γⱼ.

    ``scales`` are the diagonals Λⱼ and ``columns`` the Γⱼ. The change is transposed if the outputs are the smaller
    width. A and B belong to all layers, so the record holds them as ``bases`` instead of as tensors. A traced step has
    the `Draw` instead, and its products draw them.
    """

    scales: Float[Tensor, "r n"]
    columns: Float[Tensor, "n small"]
    bases: Bases | Draw
    large: int
    scale: float
    is_turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        large, small = self.large, self.columns.shape[1]
        return (small, large) if self.is_turned else (large, small)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        a, b = self._factors(dtype or self.dtype)
        product = b @ a
        return (product.T if self.is_turned else product) * self.scale

    def matmul(self, x: Tensor) -> Tensor:
        a, b = self._factors(x.dtype)
        first, second = (b.T, a.T) if self.is_turned else (a, b)
        linear = torch.nn.functional.linear
        return linear(linear(x, first), second) * self.scale

    def matmul_t(self, dy: Tensor) -> Tensor:
        return replace(self, is_turned=not self.is_turned).matmul(dy)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the layer's two factors: A' (n r, small) and B (large, n r).

        A' has the rows of all Λⱼ A Γⱼ, and B the columns of all Bⱼ. Both are cut to the layer's size.
        """
        n, small = self.columns.shape
        all_a, all_b = self.bases.on(self.scales.device)
        a = self.scales.to(dtype)[:, :, None] * all_a[:, :, :small].to(dtype) * self.columns.to(dtype)
        return a.flatten(0, 1), all_b[: self.large, :n].flatten(1).to(dtype)


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(LinearMethod):
    """Settings of RandLoRA, with the names that PEFT gives them.

    ``r`` is the rank of one term. ``save_projection`` writes A and B too. If a file holds them, they are checked
    against ``projection_prng_key``. ``sparse`` and ``very_sparse`` draw A and B of -1, 0 and 1.
    ``projection_size`` (largest output, largest input of the adapted layers) is filled in when the adapter is attached.
    ``randlora_dropout``: probability in training of zeroing an input of the change.
    """

    peft_type: ClassVar[str] = "RANDLORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "randlora_alpha", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"save_projection", "randlora_dropout", "fan_in_fan_out", "bias", "init_weights"}
        | {"projection_size"}  # follows from the layers
    )

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True
    projection_size: tuple[int, int] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        found += no_seeds({"projection_prng_key": self.projection_prng_key})
        return found + no_rates(self, "randlora_dropout")

    @property
    def dropout(self) -> float:
        return self.randlora_dropout

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        largest = max(site.out_features for site in sites), max(site.in_features for site in sites)
        return replace(self, projection_size=largest)

    def shapes(self, site: LinearSite) -> Shapes:
        small = min(site.out_features, site.in_features)
        n = -(-small // self.r)
        return {"randlora_lambda": (self.r, n), "randlora_gamma": (n, small)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        scales, columns = self.shapes(site).values()
        if not self.init_weights:  # as in PEFT's tests: not the base model at the start
            drawn, large = torch.randn(scales, generator=generator), max(site.out_features, site.in_features)
            return {"randlora_lambda": drawn, "randlora_gamma": torch.full(columns, 1 / large)}
        return {"randlora_lambda": torch.zeros(scales), "randlora_gamma": torch.full(columns, 1 / max(columns))}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        scales = params["randlora_lambda"]
        draw = self._draw(self.projection_size or (site.out_features, site.in_features))
        held = draw if is_tracing() else self._held(draw)  # a traced step makes tensors without values
        if isinstance(held, Bases) and not scales.is_meta:
            held.on(scales.device)  # not in the first product, which others would wait for
        change = RandomBases(
            scales=scales,
            columns=params["randlora_gamma"],
            bases=held,
            large=max(site.out_features, site.in_features),
            scale=self.randlora_alpha / self.r,
            is_turned=site.out_features < site.in_features,
        )
        return LinearDelta(adds=(change,))

    @property
    def shared(self) -> Shared | None:
        source = f"projection_prng_key={self.projection_prng_key!r}"
        names = ("randlora_A", "randlora_B")
        return Shared(
            names=names, draw=self._projections, source=source, is_saved=self.save_projection, is_repeated=True
        )

    def _projections(self) -> dict[str, Tensor]:
        if self.projection_size is None:
            return {}
        a, b = self._held(self._draw(self.projection_size)).on(torch.device("cpu"))
        return {"randlora_A": a, "randlora_B": b}

    def _held(self, draw: Draw) -> Bases:
        """Return the A and B of a draw, and keep them alive as long as this config."""
        kept: dict[Draw, Bases] = vars(self).setdefault("_kept", {})
        return kept.setdefault(draw, bases(draw))

    def _draw(self, largest: tuple[int, int]) -> Draw:
        small, large = sorted(largest)
        sparsity = math.sqrt(small) if self.very_sparse else 3 if self.sparse else None
        return Draw(seed=self.projection_prng_key, r=self.r, small=small, large=large, sparsity=sparsity)


def _kaiming(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(shape[1] * shape[2])
    empty = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return empty.uniform_(-bound, bound, generator=generator)


def _signs(shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    drawn, share = torch.rand(shape, generator=generator, device="cpu"), 1 / (2 * sparsity)
    return (drawn > 1 - share).float() - (drawn < share).float()
