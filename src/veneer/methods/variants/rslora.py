"""Scale of rsLoRA: alpha / √r instead of alpha / r (Kalajdzievski 2023, arXiv:2312.03732, eq. 4).

With alpha / r the update of each step shrinks as r grows. With alpha / √r forward and gradient keep their size in r.
"""

from __future__ import annotations

import math

SWITCH = "use_rslora"


def scale(r: int, scale_so_far: float) -> float:
    """Return the scale alpha / √r, given alpha / r."""
    return scale_so_far * math.sqrt(r)
