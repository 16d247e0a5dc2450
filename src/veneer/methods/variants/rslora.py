"""Scale of rsLoRA: alpha / √r instead of alpha / r (Kalajdzievski 2023, arXiv:2312.03732, eq. 4).

With alpha / r the update of each step shrinks as r grows. With alpha / √r forward and gradient keep their size in r.
"""

from __future__ import annotations

import math

from veneer.methods.variants import Variant


class RsLora(Variant):
    """rsLoRA as a variant of LoRA, by its field ``use_rslora``."""

    switch = "use_rslora"

    def scaled(self, scale: float, r: int) -> float:
        return scale * math.sqrt(r)
