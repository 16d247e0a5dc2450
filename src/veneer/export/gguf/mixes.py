"""Names of mixes of tensor types: llama-quantize's, and those of an adapter's file. Read without torch.

Source: ggml-org/llama.cpp, src/llama-quant.cpp (b9190).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.plain.nearest import nearest


@dataclass(frozen=True, slots=True)
class Mix:
    """Mix of tensor types. ``default`` is the ggml type of most matrices, ``number`` the value of the file's
    ``general.file_type``.
    """

    name: str
    default: str
    number: int


MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", "F32", 0), Mix("F16", "F16", 1), Mix("BF16", "BF16", 32), Mix("Q8_0", "Q8_0", 7),
        Mix("Q4_0", "Q4_0", 2), Mix("Q4_1", "Q4_1", 3), Mix("Q5_0", "Q5_0", 8), Mix("Q5_1", "Q5_1", 9),
        Mix("Q2_K", "Q2_K", 10), Mix("Q2_K_S", "Q2_K", 21),
        Mix("Q3_K_S", "Q3_K", 11), Mix("Q3_K_M", "Q3_K", 12), Mix("Q3_K_L", "Q3_K", 13),
        Mix("Q4_K_S", "Q4_K", 14), Mix("Q4_K_M", "Q4_K", 15), Mix("Q5_K_S", "Q5_K", 16), Mix("Q5_K_M", "Q5_K", 17),
        Mix("Q6_K", "Q6_K", 18), Mix("IQ4_NL", "IQ4_NL", 25), Mix("IQ4_XS", "IQ4_XS", 30),
    )
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_OF_ADAPTERS = ("F32", "F16")


def mix_of(name: str) -> Mix:
    """Return the mix of a name such as ``q4_k_m``. Raises ConfigError for an unknown one."""
    found = MIXES.get(ALIASES.get(name.upper(), name.upper()))
    if found is None:
        near = nearest(name.upper(), MIXES, 1)
        meant = f" (the nearest is {near[0]})" if near else ""
        short = ", ".join(f"{alias} for {full}" for alias, full in ALIASES.items())
        raise ConfigError(f"type {name!r} is unknown{meant}; allowed: {', '.join(MIXES)}; and {short}")
    return found


def adapter_mix_of(name: str) -> Mix:
    """Return the mix of an adapter's file. Raises ConfigError unless it is F32 or F16."""
    if name.upper() not in _OF_ADAPTERS:
        raise ConfigError(f"type {name!r} is not for adapters: give {' or '.join(_OF_ADAPTERS)}")
    return mix_of(name)
