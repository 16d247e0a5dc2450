"""Orthogonal start: A and B are both random, and ``B A = 0`` (datta0.github.io/posts/rethink-lora-init).

The rows of an orthogonal matrix are dealt to both factors in turn, so that their inner sides are orthogonal.
"""

from __future__ import annotations

import torch

from veneer.errors import ConfigError
from veneer.inits import Factors, Start
from veneer.records.sites import LinearSite

NAMES = ("'orthogonal'",)
_SIZE = 0.1  # of the entries, as PEFT has it


def find(name: bool | str) -> Start | None:
    """Return the initialisation "orthogonal"; None for another name."""
    return Start(orthogonal) if name == "orthogonal" else None


def orthogonal(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return random A and B whose product is zero, drawn as PEFT draws them. Raises ConfigError if r is odd."""
    if r % 2:
        raise ConfigError(f"the orthogonal start at {site.name} halves the rank, and r={r} is odd: give an even one")
    q = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
    columns = torch.randn(site.in_features, r // 2, generator=generator)
    rows = torch.randn(r // 2, site.out_features, generator=generator)
    return _SIZE * (columns @ q[0::2]).T, _SIZE * rows.T @ q[1::2]
