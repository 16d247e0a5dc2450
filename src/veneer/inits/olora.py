"""OLoRA: the factors start as the first columns and rows of a QR decomposition of the frozen weight.

Source: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1. Difference from PEFT: their product is subtracted in the record
instead of in the weight, which is the same function of A and B.
"""

from __future__ import annotations

import torch

from veneer.inits import Factors, Start, dense_weight
from veneer.records.sites import LinearSite

NAMES = ("'olora'",)


def find(name: bool | str) -> Start | None:
    """Return the initialisation "olora"; None for another name."""
    return Start(orthonormal, taken_off=True) if name == "olora" else None


def orthonormal(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return ``B = Q[:, :r]``, ``A = R[:r]`` of ``W = Q R``. Raises ConfigError if W is not loaded."""
    q, upper = torch.linalg.qr(dense_weight(site, r, "OLoRA"))
    return upper[:r].cpu().contiguous(), q[:, :r].cpu().contiguous()
