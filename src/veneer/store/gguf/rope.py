"""Rotary scalings in GGUF files, and as transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.store.gguf.fields import FREQUENCY_FACTORS, LONG_FACTORS, ORIGINAL_LENGTH, SCALING, SHORT_FACTORS

KEYS = frozenset(
    SCALING + name
    for name in (
        "type", "factor", "original_context_length", "attn_factor",
        "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
    )
)  # fmt: skip
OF_SCALING = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
"""Settings of rotary scalings that a config's class may have by itself."""
_YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}

_ROUNDED = (
    "YaRN's truncate false has no key: the runtime rounds the bounds between kept and scaled frequencies, so that "
    "answers to long texts may differ a little"
)


def rotary_scaling(
    pairs: Mapping[str, Any], factors: Mapping[str, Tensor], frequencies: Tensor, max_positions: int
) -> dict[str, Any]:
    """Return the ``rope_parameters`` besides the rotary base; empty for files without scaling.

    ``pairs`` are the file's values by key, without the architecture's prefix. ``factors`` are its tensors of factors by
    name. ``frequencies`` (rotary width / 2) are those without scaling, in radians per position. Raises FormatError for
    scalings that transformers does not know.
    """
    named = "longrope" if SHORT_FACTORS in factors or LONG_FACTORS in factors else "linear"
    kind = pairs.get(SCALING + "type", named)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise FormatError(f"{SCALING}type {kind!r} is none of the rotary scalings that transformers computes")
    if kind != "longrope" and pairs.get(SCALING + "attn_factor", 1.0) != 1.0:
        raise FormatError(
            f"{SCALING}attn_factor {pairs[SCALING + 'attn_factor']} is only for {SCALING}type 'longrope', not {kind!r}"
        )
    if FREQUENCY_FACTORS in factors:
        if pairs.get(SCALING + "factor", 1.0) != 1.0:
            raise FormatError(
                f"{FREQUENCY_FACTORS} and {SCALING}factor both scale frequencies, but transformers applies only one"
            )
        return _by_frequency(factors[FREQUENCY_FACTORS], frequencies, max_positions)
    if kind == "longrope" or named == "longrope":
        return _longrope(pairs, factors, max_positions)
    factor = pairs.get(SCALING + "factor", 1.0)
    if kind == "none" or factor == 1.0:
        return {}
    return _yarn(pairs, factor) if kind == "yarn" else {"rope_type": "linear", "factor": factor}


def _yarn(pairs: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the parameters of YaRN (Peng et al. 2023, arXiv 2309.00071). The attention factor needs no conversion."""
    if ORIGINAL_LENGTH not in pairs:
        raise FormatError(f"{ORIGINAL_LENGTH} is missing beside {SCALING}type 'yarn'")
    if pairs.get(SCALING + "yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1: the runtime's default, which is 1
        raise FormatError(
            f"{SCALING}yarn_ext_factor {pairs[SCALING + 'yarn_ext_factor']} is not 1, the only one that transformers "
            "computes"
        )
    given = {name: pairs[SCALING + key] for key, name in _YARN.items() if SCALING + key in pairs}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": pairs[ORIGINAL_LENGTH],
        **given,
    }


def _longrope(pairs: Mapping[str, Any], factors: Mapping[str, Tensor], max_positions: int) -> dict[str, Any]:
    """Return the parameters of LongRoPE (Ding et al. 2024, arXiv 2402.13753).

    The attention factor is left out if it equals the one that transformers computes from the model's and the original
    length.
    """
    if missing := [name for name in (SHORT_FACTORS, LONG_FACTORS) if name not in factors]:
        raise FormatError(f"the tensors {' and '.join(missing)} are missing, which LongRoPE divides frequencies by")
    if ORIGINAL_LENGTH not in pairs:
        raise FormatError(f"{ORIGINAL_LENGTH} is missing beside {SHORT_FACTORS} and {LONG_FACTORS}")
    original = pairs[ORIGINAL_LENGTH]
    found = {
        "rope_type": "longrope",
        "short_factor": factors[SHORT_FACTORS].tolist(),
        "long_factor": factors[LONG_FACTORS].tolist(),
        "original_max_position_embeddings": original,
    }
    longer = max_positions / original
    usual = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    attention = pairs.get(SCALING + "attn_factor", 1.0)
    return found if math.isclose(attention, usual, rel_tol=1e-6) else {**found, "attention_factor": attention}


def _by_frequency(factors: Tensor, frequencies: Tensor, max_positions: int) -> dict[str, Any]:
    """Return rotary parameters that divide each frequency by its factor, or an empty dict if all factors are 1.

    They are those of Llama 3's scaling if it gives these factors. Otherwise they are LongRoPE's, with these factors for
    short and long texts.
    """
    if len(factors) != len(frequencies):
        raise FormatError(
            f"{FREQUENCY_FACTORS} holds {len(factors)} factors for {len(frequencies)} frequencies of a head"
        )
    if (factors == 1).all():
        return {}
    found = _llama3(factors.double(), frequencies.double())
    if found is not None:
        return found
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": max_positions,
        "attention_factor": 1.0,
    }


def llama3_factors(frequencies: Tensor, factor: float, high: float, length: float) -> Tensor:
    """Return Llama 3.1's divisor of each frequency (n,), with low_freq_factor 1. After transformers' ``llama3``."""
    turns = frequencies * length / (2 * math.pi)  # of a frequency in the original length
    share = ((turns - 1) / (high - 1)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def _llama3(factors: Tensor, frequencies: Tensor) -> dict[str, Any] | None:
    """Return the parameters of Llama 3's scaling that give these factors, or None if there are none.

    The scaling divides slow frequencies by ``factor`` and keeps fast ones. A frequency f between them is interpolated:
    the share s = (f L / 2 pi - low) / (high - low) of it is kept, and the rest is divided. Only the ratios of L, low
    and high matter, so low is set to 1, as in every Llama.
    """
    factor = factors.max().item()
    between = (factors > 1) & (factors < factor)
    if between.sum() < 2:
        return None
    share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    line = torch.stack([frequencies[between] / (2 * math.pi), torch.ones_like(share)], dim=1)
    slope, offset = torch.linalg.lstsq(line, share[:, None]).solution.flatten().tolist()
    if offset >= 0:
        return None
    high, length = round(1 - 1 / offset, 3), round(-slope / offset)
    if not torch.allclose(llama3_factors(frequencies, factor, high, length), factors, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


@dataclass(frozen=True, slots=True)
class Scaling:
    """Rotary scaling in a file: values by key, tensors of factors by name, problems, and notes for the file's user."""

    pairs: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def said_scaling(
    parameters: Mapping[str, Any], width: int, config: Any, allowed: Collection[str], mscale: bool = False
) -> Scaling:
    """Return the file's keys for ``rope_parameters``: the inverse of `rotary_scaling`.

    ``width`` values of a head rotate. ``allowed`` are the kinds that the runtime computes for the family. ``mscale``:
    the runtime has keys for YaRN's attention factors.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in allowed:
        known = ", ".join(allowed)
        return Scaling(problems=(f"rotary scaling {kind!r}: the runtime computes {known} for this family",))
    if kind == "linear":
        return Scaling({SCALING + "type": "linear", SCALING + "factor": float(parameters["factor"])})
    if kind == "yarn":
        return _said_yarn(parameters, config, mscale)
    if kind == "llama3":
        return Scaling(factors={FREQUENCY_FACTORS: _said_factors(parameters, width)})
    if kind == "longrope":
        return _said_longrope(parameters, config)
    return Scaling()


def _said_yarn(parameters: Mapping[str, Any], config: Any, mscale: bool) -> Scaling:
    usual = {"mscale": None, "mscale_all_dim": None, "beta_fast": 32.0, "beta_slow": 1.0}
    usual["attention_factor"] = 1 + 0.1 * math.log(max(1.0, parameters["factor"]))
    problems = tuple(
        f"YaRN's {name} {parameters[name]} has no key that the runtime reads for this family"
        for name, value in (() if mscale else usual.items())
        if parameters.get(name) is not None and (value is None or not math.isclose(parameters[name], value))
    )
    notes = () if parameters.get("truncate", True) else (_ROUNDED,)
    length = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    pairs = {SCALING + "type": "yarn", SCALING + "factor": float(parameters["factor"]), ORIGINAL_LENGTH: int(length)}
    given = {SCALING + key: parameters.get(name) for key, name in _YARN.items()}
    pairs |= {key: float(value) for key, value in given.items() if value is not None}
    return Scaling(pairs, {}, problems, notes)


def _said_factors(parameters: Mapping[str, Any], width: int) -> Tensor:
    """Return the divisors (width / 2,) of Llama 3.1's scaling, computed in float32 as llama.cpp's converter does."""
    frequencies = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = parameters["original_max_position_embeddings"]
    found = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            share = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - share) / factor + share))
    return torch.tensor(found, dtype=torch.float32)


def _said_longrope(parameters: Mapping[str, Any], config: Any) -> Scaling:
    original = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
    longer = config.max_position_embeddings / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    factors = {LONG_FACTORS: parameters["long_factor"], SHORT_FACTORS: parameters["short_factor"]}
    return Scaling(
        {SCALING + "type": "longrope", SCALING + "attn_factor": float(attention)},
        {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()},
    )
