"""LoRA on disk: a start whose product is subtracted from the update, ``B A - B₀ A₀``, becomes plain LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.contract import Params
from veneer.contract.packing import Packing
from veneer.methods.lora_parts.settings import LoraSettings

_STARTS = ("lora_A_start", "lora_B_start")


def joined(params: Params) -> tuple[Tensor, Tensor]:
    """Return A and B. If the start is subtracted they are ``[A; A₀]`` and ``[B, -B₀]``, with product ``B A
    - B₀ A₀``.
    """
    a, b = params["lora_A"], params["lora_B"]
    if "lora_A_start" not in params:
        return a, b
    return torch.cat([a, params["lora_A_start"]]), torch.cat([b, -params["lora_B_start"]], dim=1)


def turned(params: Params) -> dict[str, Tensor]:
    """Return the parameters of the transposed update: (B A)ᵀ is Aᵀ Bᵀ."""
    return {"lora_A": params["lora_B"].T, "lora_B": params["lora_A"].T}


def packing_of(config: LoraSettings) -> Packing:
    """Return plain LoRA, which fits the plain base in any library. A start that is subtracted doubles the rank."""
    if config.init_lora_weights == "eva":
        return Packing({"init_lora_weights": True, "eva_config": None})
    if not config.start.taken_off:
        return Packing(fixed=config.start.fixed)
    grow = math.sqrt(2) if config.use_rslora else 2  # so that the scale stays
    return TakenOff(
        fields={
            "init_lora_weights": True,
            "corda_config": None,
            "lora_ga_config": None,
            "r": 2 * config.r,
            "lora_alpha": grow * config.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
            "alpha_pattern": {key: grow * alpha for key, alpha in config.alpha_pattern.items()},
        },
        fixed=_STARTS,
    )


@dataclass(frozen=True)
class TakenOff(Packing):
    """Packing of a subtracted start, ``- B₀ A₀``, as more rows of A and columns of B."""

    def pack(self, params: Params) -> dict[str, Tensor]:
        a, b = joined(params)
        rest = {name: value for name, value in params.items() if name not in _STARTS}
        return {**rest, "lora_A": a, "lora_B": b}

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        (a, a_start), (b, b_start) = packed["lora_A"].chunk(2), packed["lora_B"].chunk(2, dim=1)
        return {**packed, "lora_A": a, "lora_B": b, "lora_A_start": a_start, "lora_B_start": -b_start}
