"""A start whose product is taken off the update, so that the base keeps its weight: ``B A - B₀ A₀``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.contract import Params
from veneer.contract.packing import Packing


def joined(params: Params) -> tuple[Tensor, Tensor]:
    """A and B; where the start is taken off, ``[A; A₀]`` and ``[B, -B₀]``, whose product is ``B A - B₀ A₀``."""
    a, b = params["lora_A"], params["lora_B"]
    if "lora_A_start" not in params:
        return a, b
    return torch.cat([a, params["lora_A_start"]]), torch.cat([b, -params["lora_B_start"]], dim=1)


@dataclass(frozen=True)
class TakenOff(Packing):
    """The start that is taken off, ``- B₀ A₀``, as more rows of A and columns of B."""

    def pack(self, params: Params) -> dict[str, Tensor]:
        a, b = joined(params)
        rest = {name: value for name, value in params.items() if name not in self.fixed}
        return {**rest, "lora_A": a, "lora_B": b}

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        (a, a_start), (b, b_start) = packed["lora_A"].chunk(2), packed["lora_B"].chunk(2, dim=1)
        return {**packed, "lora_A": a, "lora_B": b, "lora_A_start": a_start, "lora_B_start": -b_start}
