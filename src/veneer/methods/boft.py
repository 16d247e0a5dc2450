"""BOFT: ``diag(s) W R``, the inputs rotated by m factors of blocks, and the outputs scaled (Liu et al. 2024,
arXiv:2311.06243, eq. 2 and 4).

Each factor permutes the inputs, rotates them by blocks, and permutes them back. A block is Cayley's transform of a
skew-symmetric matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, grouped
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.dropped_blocks import DROPPED, dropped_blocks, identity_at
from veneer.records.orthogonal import cayley
from veneer.records.sites import LinearSite
from veneer.records.terms.rotation import BlockRotation, Rotation
from veneer.records.terms.scale import Scale

_SIZES = ("boft_block_size", "boft_block_num")  # of which one is given


@dataclass(frozen=True, slots=True)
class Butterfly(Rotation):
    """Rotation by m factors, one after the other.

    Factor k acts on the features ``order[k]``, in this order: ``blocks[k]`` rotates them, block by block.
    """

    blocks: Float[Tensor, "m n b b"]
    order: Int[Tensor, "m width"]

    @property
    def width(self) -> int:
        return self.order.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.blocks.dtype)
        x = x.to(dtype)
        for blocks, order in zip(self.blocks.to(dtype), self.order, strict=True):
            parts = x[..., order].reshape(*x.shape[:-1], *blocks.shape[:2])
            rotated = torch.einsum("...kb,kcb->...kc", parts, blocks).flatten(-2)
            x = rotated[..., order.argsort()]
        return x

    def transposed(self) -> Butterfly:
        return Butterfly(self.blocks.mT.flip(0), self.order.flip(0))


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(LinearMethod):
    """Settings of BOFT, with the names that PEFT gives them.

    ``boft_block_size`` is the size of the blocks and ``boft_block_num`` their number: one of them is 0 and follows from
    the other. ``boft_n_butterfly_factor`` is the number m of factors. ``boft_dropout``: in a training pass, one random
    factor has this share of its blocks, drawn at random, replaced by the identity.
    Difference from PEFT: PEFT uses one factor, whatever m is, if it cannot compile its CUDA code. Here m factors are
    used.
    """

    peft_type: ClassVar[str] = "BOFT"
    headline: ClassVar[tuple[str, ...]] = (
        "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "target_modules",
    )  # fmt: skip
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"}  # the shape tells them
        | {"boft_dropout", "fan_in_fan_out", "bias", "init_weights"}
    )

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    def told(self) -> dict[str, object]:
        """Return the settings to show to people. Of block size and number of blocks, the one that is 0 is left out."""
        return {name: value for name, value in super().told().items() if value != 0 or name not in _SIZES}

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"boft_n_butterfly_factor": self.boft_n_butterfly_factor})
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) < 0 or (size == 0) == (number == 0):
            found.append(
                f"boft_block_size={size!r} and boft_block_num={number!r}: one must be 0 and the other at least 1"
            )
        return found + no_rates(self, "boft_dropout")

    @property
    def checks(self) -> Checks:
        return _Checks(self)

    def shapes(self, site: LinearSite) -> Shapes:
        size = self.boft_block_size or site.in_features // self.boft_block_num
        blocks = (self.boft_n_butterfly_factor, self.boft_block_num or site.in_features // size, size, size)
        o = site.out_features
        return {"boft_R": blocks, "boft_s": (1, o) if site.kind == "convolution" else (o, 1)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        blocks, scale = self.shapes(site).values()
        if self.init_weights:
            return {"boft_R": torch.zeros(blocks), "boft_s": torch.ones(scale)}
        drawn = [0.1 * torch.randn(shape, generator=generator) for shape in (blocks, scale)]
        return {"boft_R": drawn[0], "boft_s": 1 + drawn[1]}

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return marks of the blocks that dropout replaces by the identity in a pass, for all factors, drawn as PEFT
        draws them.
        """
        if not self.boft_dropout:
            return {}
        m, n, _, _ = self.shapes(site)["boft_R"]
        factor = torch.randint(0, m, (1,), generator=generator)
        dropped = dropped_blocks(n, self.boft_dropout, generator)
        return {DROPPED: (torch.arange(m) == factor)[:, None] & dropped}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        skew = 0.5 * (params["boft_R"] - params["boft_R"].mT)
        m, _, size, _ = skew.shape
        blocks = cayley(skew)
        if DROPPED in params:
            blocks = identity_at(params[DROPPED], blocks)
        if m == 1:
            rotation: Rotation = BlockRotation(blocks[0])
        else:
            rotation = Butterfly(blocks, orders(site.in_features, size, m, device=skew.device))
        # PEFT multiplies rows of inputs by it
        return LinearDelta(input=rotation.transposed(), output=Scale(params["boft_s"].flatten()))


@functools.lru_cache(maxsize=64)
def orders(width: int, size: int, m: int, *, device: torch.device) -> Tensor:
    """Return, for each factor, the order (m, width) in which its blocks read the features. The tensor is shared: do not
    write to it.

    Factor k reads the features in groups of 2ᵏ blocks. It interleaves the half blocks of a group's first half with
    those of its second half. So it mixes features that factor k - 1 does not mix. A single factor keeps the order.
    """
    with torch.inference_mode(False):
        features = torch.arange(width, device="cpu")
        if m == 1:
            return features[None].to(device)
        mixed = [features.view(-1, 2, 2**k, size // 2).transpose(1, 2).flatten() for k in range(m)]
        return torch.stack(mixed).to(device)


@dataclass(frozen=True)
class _Checks(Checks):
    config: BOFTConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer whose inputs cannot be divided into the config's blocks.

        With m > 1 factors, blocks must have an even size, and ``2 ** (m - 1)`` must divide their number.
        """
        given, m = self.config, self.config.boft_n_butterfly_factor
        name = "boft_block_size" if given.boft_block_size else "boft_block_num"
        value, found = given.boft_block_size or given.boft_block_num, grouped(sites)
        for site in sites:
            n = site.in_features
            if n % value:
                found.append(
                    f"{name}={value} does not divide the {n} inputs of {site.name}: give a divisor of {n}, such as "
                    f"{math.gcd(n, value)}"
                )
                continue
            size = given.boft_block_size or n // value
            if m > 1 and (size % 2 or (n // size) % 2 ** (m - 1)):
                found.append(
                    f"boft_n_butterfly_factor={m} needs blocks of an even size, and a number of them that "
                    f"{2 ** (m - 1)} divides: {site.name} has {n // size} of size {size}. Change {name}, or give 1."
                )
        return found
