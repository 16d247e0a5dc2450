"""MiCA: B starts as the left singular vectors of W's smallest singular values and is fixed; A starts at zero
(arXiv:2604.01694, section 3).

The update lies in the outputs that the weight uses least.
"""

from __future__ import annotations

import torch

from veneer.inits import Factors, Start, dense_weight
from veneer.records.sites import LinearSite

NAMES = ("'mica'",)


def find(name: bool | str) -> Start | None:
    """Return the initialisation "mica"; None for another name."""
    return Start(minor_components, keeps_b=True) if name == "mica" else None


def minor_components(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return A, which is zeros, and B, the last r left singular vectors of W. Raises ConfigError if W is not loaded."""
    u = torch.linalg.svd(dense_weight(site, r, "MiCA"), full_matrices=False).U
    return torch.zeros(r, site.in_features), u[:, -r:].cpu().contiguous()
