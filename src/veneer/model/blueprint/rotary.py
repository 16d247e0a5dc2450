"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and the scalings of its frequencies.

Frequencies are computed in float32 and in transformers' order of operations, so that tables equal the models' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Scaling that divides every frequency by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """Scaling whose base (``theta``) grows with the part of a sequence's length beyond the model's context
    ("NTK-aware"). ``factor`` says how fast.
    """

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Scaling of Llama 3.1.

    Frequencies with wavelengths above original / low are divided by ``factor``, those with wavelengths below original /
    high stay unchanged, and those between are interpolated. Original is ``original_max_positions``; low and high are
    the two frequency factors.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp from unchanged frequencies to those divided by ``factor``.

    The ramp covers the dimensions that turn ``beta_fast`` to ``beta_slow`` times in the original context. cos and sin
    are multiplied by ``attention_factor``.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for each frequency.

    It is ``short`` within the original context and ``long`` beyond it. cos and sin are multiplied by
    ``attention_factor``.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary embedding of q and k: the first ``dim`` numbers of each head are rotated by position, in pairs.

    ``interleaved``: numbers 2i and 2i + 1 are a pair (GPT-J, Cohere, GLM); otherwise i and i + dim / 2.
    ``backwards``: pairs turn by the negative angles (nanochat).
    ``max_positions``: the model's context in tokens.
    """

    dim: int
    theta: float
    max_positions: int
    interleaved: bool = False
    backwards: bool = False
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """Factor by which cos and sin are multiplied."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0

    def frequencies(self, n_tokens: int = 0) -> Float[Tensor, " half"]:
        """Return the radians by which each pair turns from one position to the next, float32.

        ``n_tokens`` is the length of the sequence, which some scalings depend on.
        """
        plain, scaling = self._plain(self.theta), self.scaling
        match scaling:
            case LinearScaling():
                return plain / scaling.factor
            case DynamicScaling():
                return self._plain(_dynamic_theta(self, scaling, n_tokens))
            case Llama3Scaling():
                return _llama3(plain, scaling)
            case YarnScaling():
                return _yarn(self, scaling)
            case LongRopeScaling():
                chosen = scaling.long if n_tokens > scaling.original_max_positions else scaling.short
                return 1.0 / (torch.tensor(chosen) / plain)
        return plain

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (…, half) in float32, of integer ``positions`` (…). If pairs turn
        backwards, the sines are negative.
        """
        longest = int(positions.max()) + 1 if positions.numel() else 0
        angles = positions[..., None].float() * self.frequencies(longest).to(positions.device)
        angles = -angles if self.backwards else angles
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _plain(self, theta: float) -> Tensor:
        return 1.0 / (theta ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim))


def _dynamic_theta(rotary: Rotary, scaling: DynamicScaling, n_tokens: int) -> float:
    longest = max(n_tokens, rotary.max_positions)
    stretch = scaling.factor * longest / rotary.max_positions - (scaling.factor - 1)
    return float(rotary.theta * stretch ** (rotary.dim / (rotary.dim - 2)))


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength, original = 2 * math.pi / plain, scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(rotary: Rotary, scaling: YarnScaling) -> Tensor:
    low, high = (_turning(rotary, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (torch.arange(rotary.dim // 2).float() - low) / (high - low if high != low else 0.001)
    divided = ramp.clamp(0, 1)
    wave = rotary.theta ** (torch.arange(0, rotary.dim, 2).float() / rotary.dim)
    return 1.0 / (scaling.factor * wave) * divided + 1.0 / wave * (1 - divided)


def _turning(rotary: Rotary, scaling: YarnScaling, turns: float) -> float:
    """Return the dimension, possibly fractional, that rotates ``turns`` times within the original context."""
    length = scaling.original_max_positions / (turns * 2 * math.pi)
    return rotary.dim * math.log(length) / (2 * math.log(rotary.theta))
